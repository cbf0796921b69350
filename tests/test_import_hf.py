"""From an exported folder back to its files: equal to the bit, and usable at once."""

import json
from types import SimpleNamespace

import pytest
import torch
from architectures import write_language_model
from conftest import TINY_CONFIG
from golden_data import TINY
from safetensors.torch import load_file, save_file

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.doctor.files import ModelFiles
from minigpt4.models import MiniGPT4, loading
from minigpt4.models import language_model as lm
from minigpt4.processors import eval_image_processor
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor
from minigpt4.tools import export_hf, import_hf

TEMPLATE = {"prompt_template": "###Human: {} ###Assistant: ", "end_sym": "###"}
CPU = torch.device("cpu")


def section(**changes):
    return read_section(ModelConfig, TINY_CONFIG | TEMPLATE | changes, "model")


def export(folder, dtype=None, image_processor=None, **changes):
    export_hf.export(section(**changes), folder, image_processor or Blip2ImageEvalProcessor(28), dtype)
    return folder


def read(cfg):
    """The tensors of all files of a ``model`` section, by YAML key, as a run reads them."""
    files = loading.locate_files(cfg)
    readers = loading.state_readers(MiniGPT4.build(cfg, files, CPU), files)
    return {key: dict(read()) for key, read in readers.items()}


def imported(folder):
    """The configuration that an import wrote."""
    return Config(SimpleNamespace(cfg_path=folder / "chat.yaml", options=None)).check()


def is_equal(one, other):
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and value.equal(other[name]) for name, value in one.items()
    )


def half(tmp_path):
    """The tiny model with files of three precisions, one of them with a trained Q-Former in its checkpoint."""
    vit = {name: value.half() for name, value in load_file(TINY / "eva_vit.safetensors").items()}
    save_file(vit, tmp_path / "vit.safetensors")
    q_former = {name: value + 1 for name, value in load_file(TINY / "qformer.safetensors").items()}
    names = [name for name in q_former if name == "query_tokens" or "crossattention" in name]
    state = torch.load(TINY / "minigpt4_ckpt.pth")["model"] | {name: q_former[name] for name in names}
    torch.save({"model": state}, tmp_path / "ckpt.pth")
    return {"vit_weights": str(tmp_path / "vit.safetensors"), "ckpt": str(tmp_path / "ckpt.pth")}


@pytest.mark.parametrize("case", ["float32", "mixed", "mixed and widened", "tied embeddings"])
def test_export_and_import_give_every_tensor_to_the_bit(tmp_path, monkeypatch, case):
    changes = {}
    if "mixed" in case:
        changes = half(tmp_path)
    elif case == "tied embeddings":  # and several shards
        changes = {"llama_model": str(write_language_model(tmp_path / "llm", "llama3"))}
        changes["ckpt"] = str(tmp_path / "ckpt.pth")
        model = MiniGPT4.from_config(section(**changes | {"ckpt": None}), "cpu")
        torch.save({"model": model.trainable_state_dict()}, tmp_path / "ckpt.pth")
        monkeypatch.setattr("minigpt4.tools.model_folder.SHARD_BYTES", 10**5)
    original = section(**changes)
    expected = read(original)
    source = export(tmp_path / "export", torch.float32 if "widened" in case else None, **changes)
    if case == "float32":  # an exported folder is a source of vision weights, too
        states = read(section(vit_weights=str(source), q_former_model=str(source)))
        assert all(is_equal(states[key], state) for key, state in expected.items())
    assert import_hf.import_folder(source, tmp_path / "back") == []
    restored = read(read_section(ModelConfig, imported(tmp_path / "back").model_cfg, "model"))
    trained = {name: value for name, value in expected["model.ckpt"].items() if not name.startswith("llama_proj")}
    expected["model.q_former_model"] |= trained  # which replaced them
    assert restored.keys() == expected.keys()
    for key, state in expected.items():
        assert is_equal(restored[key], state), key
    folder = lm.check_folder(tmp_path / "back" / "llama_model")
    assert folder["vocab_size"] == len(restored["model.llama_model"]["model.embed_tokens.weight"])
    for file in (tmp_path / "llm" if "llm" in original.llama_model else TINY / "llama").iterdir():
        if file.suffix in (".json", ".model"):
            assert (tmp_path / "back" / "llama_model" / file.name).read_bytes() == file.read_bytes()


def test_the_written_yaml_is_the_chat_that_was_exported(tmp_path):
    images = Blip2ImageEvalProcessor(28, mean=[0.5, 0.5, 0.5], draft=True)
    import_hf.import_folder(export(tmp_path / "a", image_processor=images), tmp_path / "b")
    cfg = imported(tmp_path / "b")
    processor = eval_image_processor(cfg)
    assert (processor.mean, processor.std, processor.draft) == (images.mean, images.std, True)
    was, now = section(), read_section(ModelConfig, cfg.model_cfg, "model")
    files = ("llama_model", "vit_weights", "q_former_model", "ckpt")
    assert {n for n in vars(was) if getattr(was, n) != getattr(now, n)} == set(files)
    findings = ModelFiles(now, CPU).check()
    assert {f.verdict for f in findings} == {"ok"} and len(findings) == 6


def test_what_an_export_changed_is_said(tmp_path, capsys):
    llm = str(write_language_model(tmp_path / "llm", "llama2"))
    settings = {"llama_model": llm, "lora_r": 2, "ckpt": None}
    model = MiniGPT4.from_config(section(**settings), "cpu")
    state = {name: torch.randn_like(value) for name, value in model.trainable_state_dict().items()}
    torch.save({"model": state}, tmp_path / "c.pth")
    source = export(tmp_path / "export", torch.bfloat16, **settings | {"ckpt": str(tmp_path / "c.pth")})
    assert import_hf.main([str(source), "--out", str(tmp_path / "back")]) == 0
    text = capsys.readouterr().out
    sentence = "weights are bfloat16 here, as they were exported, and float32 in the original files"
    assert all(f"model.{key}: {sentence}" in text for key in ("llama_model", "vit_weights", "ckpt"))
    assert "the LoRA weights of the run are merged" in text
    assert not imported(tmp_path / "back").model_cfg.get("lora_r")


def test_what_cannot_be_imported_is_refused(tmp_path, capsys):
    source = export(tmp_path / "export")
    with pytest.raises(UserError, match=r"exists and is not an empty folder"):
        import_hf.import_folder(source, source)
    (source / "model.safetensors").rename(source / "model-00002-of-00002.safetensors")
    weight_map = {"query_tokens": "model-00002-of-00002.safetensors", "x": "model-00001-of-00002.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"1 of 2 files .* missing .*\(first: model-00001-of-00002.safetensors\)"):
        import_hf.import_folder(source, tmp_path / "back")
    tensors = load_file(source / "model-00002-of-00002.safetensors")
    (source / "model.safetensors.index.json").unlink()
    for name in ("language_projection.bias", "language_model.model.norm.weight"):
        (source / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
        save_file({n: value for n, value in tensors.items() if n != name}, source / "model.safetensors")
        with pytest.raises(
            UserError, match=r"no tensor from which '(llama_proj.bias|model.norm.weight)'.*copy it again"
        ):
            import_hf.import_folder(source, tmp_path / "back")
    (source / "minigpt4" / "origin.json").write_text("{}")
    assert import_hf.main([str(source), "--out", str(tmp_path / "back")]) == 1
    assert "as export_hf writes it" in capsys.readouterr().err and not (tmp_path / "back").exists()

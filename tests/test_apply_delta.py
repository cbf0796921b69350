"""The delta tool on tiny Llama folders: an exact sum, and one message for each mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt4.models.language_model import load_language_model
from minigpt4.tools import apply_delta as tool
from minigpt4.tools import model_folder

transformers = pytest.importorskip("transformers")
NAMES = tool.VOCABULARY_TENSORS


def make_model(rows: int, seed: int, **changes: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, **sizes)).half()


def save_folder(model: transformers.LlamaForCausalLM, folder: Path, *, as_bin: bool, num_shards: int = 3) -> None:
    """Writes shards as their publishers did: .bin with rotary frequencies, or .safetensors."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if as_bin:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    stem, ending = ("pytorch_model", "bin") if as_bin else ("model", "safetensors")
    weight_map = {}
    for number in range(num_shards):
        file = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.{ending}"
        part = {name: state[name] for name in list(state)[number::num_shards]}
        weight_map |= dict.fromkeys(part, file)
        if as_bin:
            torch.save(part, folder / file)
        else:
            model_folder.save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Base of 32 tokens in .bin files, delta of 33 in .safetensors, as LLaMA and Vicuna v0 relate."""
    base, delta = make_model(32, 0), make_model(33, 1)
    delta.model.norm.weight.data.mul_(0.01)
    paths = {name: tmp_path / name for name in ("base", "delta", "target")}
    save_folder(base, paths["base"], as_bin=True)
    save_folder(delta, paths["delta"], as_bin=False)
    (paths["base"] / "tokenizer.model").write_bytes(b"base")
    (paths["delta"] / "tokenizer.model").write_bytes(b"delta")
    return paths


def run(folders: dict[str, Path], *more: str) -> int:
    return tool.main([part for name in folders for part in (f"--{name}", str(folders[name]))] + list(more))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_sum_is_exact(folders, dtype, monkeypatch, capsys):
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 5000)
    assert run(folders, "--dtype", dtype) == 0
    state, base, delta = read_weights(folders["target"]), make_model(32, 0).state_dict(), make_model(33, 1).state_dict()
    delta[tool.FINAL_NORM] = delta[tool.FINAL_NORM] * 0.01
    assert state.keys() == delta.keys()  # no rotary frequencies
    for name, value in delta.items():
        rows = base[name].shape[0]
        expected = torch.cat([base[name].float() + value[:rows].float(), value[rows:].float()]).to(tool.DTYPES[dtype])
        assert torch.equal(state[name], expected), name
    assert state[NAMES[0]].shape[0] == state[NAMES[1]].shape[0] == 33
    files = sorted(file.name for file in folders["target"].glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert "33 tokens" in capsys.readouterr().out


def test_result_loads_as_language_model(folders):
    assert run(folders) == 0
    target = folders["target"]
    model = load_language_model(target, torch.float32)
    assert model.config.vocab_size == 33 and model.model.embed_tokens.weight.shape[0] == 33
    assert (target / "tokenizer.model").read_bytes() == b"delta"
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"
    assert (target / "generation_config.json").is_file()
    assert not list(target.parent.glob("*.partial-*"))


def test_other_formats_and_the_tokenizer_of_the_base(folders, tmp_path):
    base = make_model(33, 0)
    paths = {"base": tmp_path / "single", "delta": folders["delta"], "target": folders["target"]}
    base.save_pretrained(paths["base"])  # one model.safetensors, as many rows as the delta
    (paths["base"] / "tokenizer.model").write_bytes(b"base")
    (paths["delta"] / "tokenizer.model").unlink()
    paths["target"].mkdir()  # an empty folder is allowed
    assert run(paths) == 0
    assert (paths["target"] / "tokenizer.model").read_bytes() == b"base"
    expected = base.state_dict()[NAMES[0]].float() + make_model(33, 1).state_dict()[NAMES[0]].float()
    assert torch.equal(read_weights(paths["target"])[NAMES[0]], expected.half())


def spoil_swapped(folders):
    folders["base"], folders["delta"] = folders["delta"], folders["base"]


def spoil_delta_is_whole(folders):
    shutil.rmtree(folders["delta"])
    save_folder(make_model(33, 1), folders["delta"], as_bin=False)


def spoil_same(folders):
    folders["delta"] = folders["base"]


def spoil_missing_shard(folders):
    (folders["base"] / "pytorch_model-00002-of-00003.bin").unlink()


def spoil_cut_short(folders):
    file = folders["base"] / "pytorch_model-00002-of-00003.bin"
    file.write_bytes(file.read_bytes()[:2000])


def spoil_cut_short_safetensors(folders):
    file = folders["delta"] / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def spoil_other_size(folders):
    shutil.rmtree(folders["base"])
    save_folder(make_model(32, 0, hidden_size=32), folders["base"], as_bin=True)


def spoil_other_shape(folders):
    file = folders["delta"] / "model-00001-of-00003.safetensors"
    state = load_file(file)
    name = next(name for name in state if name not in NAMES)
    model_folder.save_file(state | {name: state[name][:-1].contiguous()}, file)


def spoil_other_layers(folders):
    file = folders["base"] / "pytorch_model-00001-of-00003.bin"
    state = torch.load(file)
    state.pop("model.layers.0.input_layernorm.weight", None)
    state["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(2)
    torch.save(state, file)


def spoil_vocabulary(folders):
    shutil.rmtree(folders["base"])
    save_folder(make_model(30, 0), folders["base"], as_bin=True)


def spoil_vocab_size(folders):
    file = folders["delta"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 32}))


def spoil_llama_2(folders):
    file = folders["base"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-5}))


def spoil_target(folders):
    folders["target"].mkdir()
    (folders["target"] / "mine.txt").touch()


def spoil_no_folder(folders):
    folders["base"] = folders["base"] / "nothing.bin"


def spoil_no_weights(folders):
    for file in folders["base"].glob("pytorch_model*"):
        file.unlink()


def spoil_no_tokenizer(folders):
    for name in ("base", "delta"):
        (folders[name] / "tokenizer.model").unlink()


def spoil_nan(folders):
    file = folders["delta"] / "model-00001-of-00003.safetensors"
    state = load_file(file)
    state[next(iter(state))][0] = float("nan")
    model_folder.save_file(state, file)


def spoil_vicuna_v0(folders):
    for name, rows in (("base", 32001), ("delta", 32001)):
        shutil.rmtree(folders[name])
        model = make_model(rows, 0)
        model.model.norm.weight.data.mul_(0.01 if name == "delta" else 1)
        save_folder(model, folders[name], as_bin=False)


def as_published(folders, rows=33):
    """Base, delta and fine-tuned model as they relate in fp16: the delta is the difference of the two."""
    base, target = make_model(32, 0), make_model(rows, 0)
    torch.manual_seed(2)
    difference = make_model(rows, 0)
    for name, value in target.state_dict().items():
        own = base.state_dict()[name]
        noise = torch.randn_like(own, dtype=torch.float32) * own.float().std().nan_to_num().clamp(min=0.02) / 20
        value[: len(own)] = (own.float() + noise).half()
        copy = difference.state_dict()[name]
        copy.copy_(value)
        copy[: len(own)] -= own
    for name, model in (("base", base), ("delta", difference), ("vicuna", target)):
        folders[name] = folders["target"].with_name(name)
        shutil.rmtree(folders[name], ignore_errors=True)
        save_folder(model, folders[name], as_bin=name == "base")
        (folders[name] / "tokenizer.model").write_bytes(b"tokenizer")
    return folders.pop("vicuna")


@pytest.mark.parametrize("rows", [33, 32], ids=["v0", "v1.1"])
def test_a_delta_as_published(folders, rows):
    vicuna = as_published(folders, rows)
    assert run(folders) == 0
    expected, found = read_weights(vicuna), read_weights(folders["target"])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # small weights that changed much are rounded


def spoil_vicuna_as_base(folders):
    folders["base"] = as_published(folders, rows=32)


def spoil_config(folders):
    (folders["delta"] / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_swapped, "are swapped"),
        (spoil_delta_is_whole, "is a whole model"),
        (spoil_same, "are the same folder"),
        (spoil_missing_shard, "1 of 3 files"),
        (spoil_cut_short, "cannot be read as weights"),
        (spoil_cut_short_safetensors, "cannot be read as weights"),
        (spoil_other_size, "hidden_size 32 and 16"),
        (spoil_other_shape, "in --base and ["),
        (spoil_other_layers, "differ in"),
        (spoil_vocabulary, "30 tokens and --delta 33"),
        (spoil_vocab_size, "config.json has vocab_size 32"),
        (spoil_llama_2, "not Llama 2"),
        (spoil_target, "is not an empty folder"),
        (spoil_no_folder, "does not exist"),
        (spoil_no_weights, "holds no model.safetensors or pytorch_model.bin"),
        (spoil_no_tokenizer, "tokenizer.model"),
        (spoil_nan, "not finite"),
        (spoil_config, "no valid JSON"),
        (spoil_vicuna_v0, "it is Vicuna v0, to which the delta is added already"),
        (spoil_vicuna_as_base, "perhaps it is Vicuna already"),
    ],
)
def test_mistakes_end_in_one_message(folders, spoil, message, capsys):
    spoil(folders)
    assert run(folders) == 1
    captured = capsys.readouterr().err
    errors = [line for line in captured.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in captured
    assert not (folders["target"] / "config.json").exists()
    assert not list(folders["target"].parent.glob("*.partial-*"))


def test_interrupted_run_leaves_nothing(folders, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "write_json", interrupt)
    assert run(folders) == 130
    assert not folders["target"].exists() and not list(folders["target"].parent.glob("*.partial-*"))


def test_a_failure_to_write_is_reported_and_leaves_nothing(folders, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise model_folder.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(model_folder, "save_file", refuse)
    assert run(folders) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not folders["target"].exists() and not list(folders["target"].parent.glob("*.partial-*"))


def test_a_full_disk_is_reported_beforehand(folders, monkeypatch, capsys):
    usage = tool.shutil.disk_usage(folders["base"])
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert run(folders) == 1
    assert "are needed" in capsys.readouterr().err

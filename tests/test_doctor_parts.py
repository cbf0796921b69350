"""The parts of the doctor: kinds of files, the checks at the head of a run, and the guide."""
# ruff: noqa: F811  (fixtures are imported by name)

import re
from argparse import Namespace

import pytest
import torch
from doctor_world import GUIDE, ROOT, edit, llama, with_vocabulary, world  # noqa: F401

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.doctor.language import check_language_model
from minigpt4.doctor.resources import timed_steps
from minigpt4.models import MiniGPT4, loading
from minigpt4.models.language_model import load_language_model
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.packed_attention import PackedBatch


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"llama_proj.weight": (5120, 768)}, "for a 13B LM"),
        ({"llama_proj.weight": (4096, 5632)}, "Llama-2 variant"),
        ({"model.embed_tokens.weight": (32001, 4096)}, "7B, vocabulary 32001 (Vicuna v0)"),
        ({"model.embed_tokens.weight": (32000, 5120)}, "13B, vocabulary 32000 (LLaMA, or Vicuna from v1.1 on)"),
        ({"model.layers.3.mlp.up_proj.weight": (4, 4)}, "one part of several"),
        ({"tok_embeddings.weight": (32000, 4096)}, "Meta's own form"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (8, 4096)}, "LoRA"),
        ({"query_tokens": (1, 32, 768), "t5_proj.weight": (4096, 768)}, "Q-Former"),
        ({"pos_embed": (1, 257, 1408)} | {f"blocks.{i}.norm1.weight": (1408,) for i in range(40)}, "eva_vit_g.pth"),
        ({"shared.weight": (1, 1), "encoder.block.0.layer.0.layer_norm.weight": (1,)}, "T5"),
        ({"a": (1,), "b": (1,)}, "a, b"),
        ({}, "without tensors"),
    ],
)
def test_kinds_of_files(shapes, words):
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert words in weights.describe_weights(state) and words in weights.describe_weights({"model": state})


def test_files_are_compared_before_any_weight_is_read(world, monkeypatch, llama):
    monkeypatch.chdir(ROOT)

    def check(*options):
        options = [f"model.ckpt={world}/checkpoint_3.pth", *options]
        cfg = Config(Namespace(cfg_path="train_configs/quickstart_stage2.yaml", options=options)).check()
        return MiniGPT4.from_config(cfg.model_cfg, device="meta")

    assert {parameter.device.type for parameter in check().parameters()} == {"meta"}
    with pytest.raises(UserError, match=r"model\.ckpt is still the placeholder"):
        check("model.ckpt=/path/to/ckpt.pth")
    edit(llama, lambda state: state["lm_head.weight"].fill_(torch.nan))  # a value, which is not read
    check(f"model.llama_model={llama}")
    edit(llama, lambda state: state.pop("lm_head.weight"))
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"model\.llama_model.*missing \(lm_head\.weight\)"):
        check(f"model.llama_model={llama}")
    with pytest.raises(UserError, match=r"model\.q_former_model"):
        check("model.q_former_model=quickstart/weights/eva_vit.safetensors")


def test_padded_rows_are_used_where_packed_ones_are_wrong(llama, caplog, monkeypatch):
    tokenizer = load_tokenizer(llama)
    model = Namespace(llama_model=load_language_model(llama, torch.float32), llama_tokenizer=tokenizer, packs_rows=True)
    check_language_model(model)
    assert model.packs_rows and not caplog.records
    attend = PackedBatch.attend
    monkeypatch.setattr(PackedBatch, "attend", lambda *args, **settings: attend(*args, **settings) * 1.1)
    check_language_model(model)
    assert not model.packs_rows and "cannot compute packed rows" in caplog.text


def test_a_dead_model_is_told_at_the_head_of_training(llama, caplog):
    tokenizer = load_tokenizer(llama)
    check_language_model(Namespace(llama_model=load_language_model(llama, torch.float32), llama_tokenizer=tokenizer))
    assert not caplog.records
    edit(llama, lambda state: state["lm_head.weight"].zero_())
    check_language_model(Namespace(llama_model=load_language_model(llama, torch.float32), llama_tokenizer=tokenizer))
    assert "it predicts nothing (loss 6.64" in caplog.text and "#a-dead-language-model" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("X out of memory."), RuntimeError("can't allocate memory")])
def test_out_of_memory_is_explained(error):
    told = devices.explain_out_of_memory(error, "run.batch_size_train")
    assert "lower run.batch_size_train" in told and "#out-of-memory" in told
    assert devices.explain_out_of_memory(RuntimeError("shape mismatch"), "") is None


def test_every_link_into_the_guide_leads_somewhere():
    def anchor(title):
        return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")

    text = GUIDE.read_text(encoding="utf-8")
    anchors = {anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    named = set()
    for file in [*(ROOT / "minigpt4").rglob("*.py"), ROOT / "train.py", ROOT / "demo.py"]:
        code = file.read_text(encoding="utf-8")
        named |= set(re.findall(r"""\bsee\(\s*"([^"]+)"\s*\)""", code))
        named |= set(re.findall(r"TROUBLESHOOTING\.md#([\w-]+)", code)) - {"anchor"}
        named |= set(re.findall(r'_ANCHOR = "([^"]+)"', code))
    assert len(named) >= 10 and named <= anchors
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert (GUIDE.parent / link).exists(), link


def test_steps_are_tried_without_a_tracker(monkeypatch):
    class Stop(Exception):
        pass

    def runner(cfg, **_):
        raise Stop(dict(cfg.run_cfg))

    task = Namespace(build_model=lambda cfg: None, build_datasets=lambda cfg: {})
    monkeypatch.setattr("minigpt4.tasks.setup_task", lambda cfg, device: task)
    monkeypatch.setattr("minigpt4.runners.RunnerBase", runner)
    options = ["run.wandb_log=True", "run.tracker=tensorboard"]
    cfg = Config(Namespace(cfg_path=str(ROOT / "train_configs/quickstart_stage1.yaml"), options=options))
    with pytest.raises(Stop) as stop:
        timed_steps(None, cfg, Namespace(device=None), 1)
    assert not stop.value.args[0]["wandb_log"] and not stop.value.args[0]["tracker"]

"""LoRA in the doctor, the demo and the merge tool, on the small world."""
# ruff: noqa: F811  (fixtures are imported by name)

import sys
from argparse import Namespace

import pytest
import torch
from doctor_world import ROOT, diagnose, errors_of, the_error, world  # noqa: F401

from demo import build_chat
from minigpt4.common.config import Config
from minigpt4.models import MiniGPT4
from minigpt4.models.lora import lora_parameters
from minigpt4.tools import merge, model_folder
from quickstart import lora, scenes

LORA = ("model.lora_r=8", "model.lora_target_modules=[q_proj,v_proj,down_proj]")
TRAINING = "memory, training"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the small world with LoRA weights that are not zero, and a model that has loaded it."""
    options = ["model.ckpt=null", *LORA]
    cfg = Config(Namespace(cfg_path=ROOT / "eval_configs/quickstart_eval.yaml", options=options)).check()
    model, generator = MiniGPT4.from_config(cfg.model_cfg, "cpu").eval(), torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.llama_model).values():
        parameter.data.normal_(std=0.05, generator=generator)
    file = tmp_path_factory.mktemp("lora") / "checkpoint_0.pth"
    content = {"model": model.trainable_state_dict(), "config": {"model": {"lora_alpha": 16}}}
    torch.save(content, file)
    return file, model


@pytest.mark.parametrize("precision", ["half", "int8", "nf4"])
def test_the_doctor_predicts_what_lora_needs(diagnose, precision):
    """Also beside quantised layers, whose files are compared before they are quantised."""
    option = f"model.llm_precision={precision}"
    plain, found = diagnose(option), diagnose(option, *LORA)
    assert not errors_of(plain) and not errors_of(found)
    before, after = plain[TRAINING].numbers, found[TRAINING].numbers
    lora = 4 * 8 * 4 * (2 * (160 + 160) + 160 + 432)  # rank 8 in 4 layers, float32
    assert after["LoRA"] == lora and after["language model"] == before["language model"]
    assert after["gradients"] == before["gradients"] + lora and after["optimizer"] == before["optimizer"] + 2 * lora
    assert after["activations"] > before["activations"]
    assert ("LoRA" in found["memory, chat"].numbers) == (precision != "half")  # otherwise it is merged


def test_the_doctor_compares_checkpoints_with_lora(diagnose, checkpoint, monkeypatch):
    file, _ = checkpoint
    found = diagnose(*LORA, f"model.ckpt={file}")
    assert not errors_of(found) and "LM with LoRA (model.ckpt)" in found["model.ckpt"].evidence
    the_error(diagnose(f"model.ckpt={file}"), "model.ckpt", "holds LoRA weights, but model.lora_r is 0", "lora_r: 8")


def test_the_doctor_names_the_package_that_nf4_needs(diagnose, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    the_error(diagnose("model.llm_precision=nf4"), "model.llm_precision", "pip install bitsandbytes")


def answers(model):
    """The logits of a prompt's next token; words stand for an image, as in the language model's own training."""
    image = "large red circle top small black ring left" + " nothing" * 4
    prompt = f"###Human: <Img>{image}</Img> Describe this image in detail. ###Assistant: The"
    return model.llama_model(inputs_embeds=model.get_context_emb(prompt, [])).logits[0, -1].float()


@torch.no_grad()
def test_the_demo_merges_lora_into_half_precision(checkpoint):
    file, model = checkpoint
    expected = answers(model)
    for precision, limit in {"half": 0.1, "int8": 0.1, "nf4": 0.3}.items():
        options = [f"model.ckpt={file}", f"model.llm_precision={precision}", "run.device=cpu", *LORA]
        chat = build_chat(Namespace(cfg_path="eval_configs/quickstart_eval.yaml", options=options, gpu_id=None, seed=1))
        assert bool(lora_parameters(chat.model.llama_model)) == (precision != "half")
        error = (answers(chat.model) - expected).norm() / expected.norm()
        assert error < limit, precision


def test_the_demo_warns_of_an_untrained_projection(caplog):
    options = ["model.ckpt=null", "run.device=cpu"]
    build_chat(Namespace(cfg_path="eval_configs/quickstart_eval.yaml", options=options, gpu_id=None, seed=1))
    assert "model.ckpt is not set: answers come from an untrained projection" in caplog.text


@torch.no_grad()
def test_a_merged_folder_is_a_plain_language_model(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 1_000_000)
    file, model = checkpoint
    target = tmp_path / "merged"
    arguments = ["--cfg-path", "eval_configs/quickstart_eval.yaml", "--ckpt", str(file), "--out", str(target)]
    assert merge.main([*arguments, "--options", *LORA]) == 0, capsys.readouterr().err
    assert f"model.ckpt to {target / 'checkpoint.pth'}" in capsys.readouterr().out
    assert len(list(target.glob("*.safetensors"))) > 1 and (target / "tokenizer.model").is_file()
    options = [f"model.llama_model={target}", f"model.ckpt={target / 'checkpoint.pth'}"]
    cfg = Config(Namespace(cfg_path="eval_configs/quickstart_eval.yaml", options=options)).check()
    merged = MiniGPT4.from_config(cfg.model_cfg, "cpu").eval()
    expected, actual = answers(model), answers(merged)
    assert not lora_parameters(merged.llama_model) and (actual - expected).norm() / expected.norm() < 0.02
    assert merge.main([*arguments, "--options", *LORA]) == 1
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["model.lora_r is 0: there is nothing to merge"]),
        (("model.lora_r=4",), ["model.ckpt", "rank 8, model.lora_r is 4"]),
        ((*LORA, "model.llama_model=quickstart"), ["model.llama_model"]),
    ],
    ids=["no LoRA", "another rank", "no language model"],
)
def test_what_cannot_be_merged_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(ROOT)
    arguments = ["--cfg-path", "eval_configs/quickstart_eval.yaml", "--ckpt", str(checkpoint[0]), "--out"]
    options = ["--options", *options] if options else []
    assert merge.main([*arguments, str(tmp_path / "merged"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and not [word for word in words if word not in error], error
    assert list(tmp_path.iterdir()) == []


def test_the_new_wording_of_the_small_world_can_be_parsed():
    from random import Random

    scene = scenes.draw_scene(Random(0))
    assert lora.parse(lora.new_wording(scene)) == set(scene.things) and not scenes.parse(lora.new_wording(scene))

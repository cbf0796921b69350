"""What the tests of the doctor share: a small world, and the findings on a changed configuration."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.doctor import memory
from minigpt4.doctor.checks import run_checks
from minigpt4.doctor.findings import ERROR
from quickstart import scenes

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "quickstart" / "weights"
GUIDE = ROOT / "docs" / "TROUBLESHOOTING.md"
STAGES = {1: "cc_sbu", 2: "cc_sbu_align"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=2, scenes_per_shard=30, seed=1)
    scenes.write_alignment(folder / "align", num_scenes=30, seed=2)
    projection = {"llama_proj.weight": torch.randn(160, 128) / 10, "llama_proj.bias": torch.zeros(160)}
    torch.save({"model": projection, "epoch": 3, "config": {}}, folder / "checkpoint_3.pth")
    return folder


_PREDICTED = {}


def once(predict):
    """A prediction of memory, which takes most of a diagnosis, computed once for all models of the same layout."""

    def remembered(model, *arguments):
        weights = [(name, *value.shape, value.dtype, value.requires_grad) for name, value in model.named_parameters()]
        settings = {name: value for name, value in vars(model).items() if isinstance(value, int | str | list)}
        settings["checkpointing"] = model.llama_model.is_gradient_checkpointing
        key = repr((predict.__name__, weights, settings, len(model.llama_tokenizer), arguments))
        if key not in _PREDICTED:
            _PREDICTED[key] = predict(model, *arguments)
        return _PREDICTED[key]

    return remembered


@pytest.fixture
def diagnose(world, tmp_path, monkeypatch):
    """Examines a quickstart stage whose configuration is changed, and returns its findings by check."""
    monkeypatch.chdir(ROOT)
    for predict in (memory.training, memory.chat):
        monkeypatch.setattr(memory, predict.__name__, once(predict))

    def run(*changes, stage=2, **arguments):
        storage = {1: "shards", 2: "align"}[stage]
        options = [f"datasets.{STAGES[stage]}.build_info.storage={world / storage}", "run.device=cpu"]
        options += [f"run.output_dir={tmp_path / 'output'}", *([f"model.ckpt={world}/checkpoint_3.pth"] * (stage == 2))]
        settings = {"deep": False, "steps": 0, "samples": 8, "memory": None, "sheet": tmp_path / "sheet.png"}
        file = f"train_configs/quickstart_stage{stage}.yaml"
        found = run_checks(Namespace(cfg_path=file, options=[*options, *changes], **settings | arguments))
        assert len({f.check for f in found}) == len(found)
        return {f.check: f for f in found}

    return run


def errors_of(findings):
    return {check: f for check, f in findings.items() if f.verdict == ERROR}


def the_error(findings, check, *words):
    """The only mistake among findings: its check, and its words in evidence and remedy."""
    assert list(errors_of(findings)) == [check], {c: f.evidence for c, f in errors_of(findings).items()}
    finding = findings[check]
    text = f"{finding.evidence} {finding.remedy}"
    assert not [word for word in words if word not in text], text
    assert finding.remedy
    return finding


@pytest.fixture
def llama(tmp_path):
    """A copy of the small world's LM, to be damaged."""
    return shutil.copytree(WEIGHTS / "llama", tmp_path / "llama")


def edit(folder, change):
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_vocabulary(folder, rows):
    def change(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], state[name][:1].repeat(rows - len(state[name]), 1)])

    edit(folder, change)
    edit_json(folder / "config.json", vocab_size=rows)

"""The limits at which the doctor warns and objects, through the command and its JSON."""

import json
import os
import runpy
import shutil
import sys
from collections import namedtuple

import pytest
from behaviour import CAPTIONS, align_section, wait, write_config, write_pairs
from golden_data import TINY
from safetensors.torch import load_file, save_file

from minigpt4.common import device as devices
from minigpt4.doctor import checks  # imported before processes are forked

DISK, MEMORY, LM, SAMPLES = "disk, checkpoints", "memory, training", "LM loss", "datasets.cc_sbu_align/train"
Usage = namedtuple("Usage", "total used free")


def run_doctor(folder, before=lambda: None, model=None):
    """The findings of ``python -m minigpt4.doctor --json`` in a process of its own, by check."""
    if not (folder / "align").exists():
        write_pairs(folder / "align")
    settings = {"output_dir": str(folder / "out"), "max_epoch": 3}
    file = write_config(folder / "run.yaml", settings, align_section(folder / "align"), model)
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(os.open(folder / "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            command = ["doctor", "--cfg-path", file, "--json", "--samples", "8", "--sheet", folder / "sheet.png"]
            sys.argv = list(map(str, command))
            before()
            runpy.run_module("minigpt4.doctor", run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = wait(pid, 60)
    findings = {row["check"]: row for row in json.loads((folder / "stdout").read_text())["findings"]}
    assert status == ("error" in {row["verdict"] for row in findings.values()})
    return findings


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return run_doctor(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(
    ("share_of_disk", "disk", "share_of_memory", "memory"),
    [(0.78, "ok", 0.88, "ok"), (0.82, "warning", 0.92, "warning"), (1.01, "error", 1.01, "error")],
)
def test_limits_of_disk_and_memory(sound, tmp_path, share_of_disk, disk, share_of_memory, memory):
    """The shares of the free space that the checkpoints need, and of the memory that a training step needs."""
    on_disk, in_memory = sound[DISK]["numbers"]["needed"], sum(sound[MEMORY]["numbers"].values())
    assert on_disk > 3 * 3 * 4 * (64 * 48 + 64)  # weights and two moments of the projection, three times
    assert in_memory > sum(value.nbytes for value in load_file(TINY / "llama" / "model.safetensors").values())

    def limit():
        shutil.disk_usage = lambda _: Usage(10 * on_disk, 0, int(on_disk / share_of_disk))
        devices.memory_left = lambda _: (int(in_memory / share_of_memory),) * 2

    found = run_doctor(tmp_path, limit)
    assert (found[DISK]["verdict"], found[MEMORY]["verdict"]) == (disk, memory)


@pytest.mark.parametrize(("num_missing", "verdict"), [(3, "warning"), (4, "error")])
def test_half_of_the_samples_unreadable_is_an_error(sound, tmp_path, num_missing, verdict):
    assert sound[SAMPLES]["verdict"] == "ok"
    write_pairs(tmp_path / "align")
    for i, file in enumerate(sorted((tmp_path / "align" / "image").iterdir())[:num_missing]):
        file.unlink() if i % 2 else file.write_bytes(b"<html>not found</html>")
    found = run_doctor(tmp_path)[SAMPLES]
    assert found["verdict"] == verdict and found["numbers"]["unreadable"] == num_missing / len(CAPTIONS)


@pytest.mark.parametrize(
    ("value", "precision", "is_sampled", "is_error"),
    [
        (70_000, "fp16", False, True),
        (70_000, "fp16", True, True),
        (60_000, "fp16", True, False),
        (70_000, "fp32", True, False),
    ],
)
def test_a_weight_beyond_fp16(tmp_path, value, precision, is_sampled, is_error):
    """In a small LM, whose loss is computed, and in one that is too large for that and is sampled."""
    folder = shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.bin"))
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][0, 0] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def before():
        checks.SMALL_LM = 0 if is_sampled else checks.SMALL_LM

    found = run_doctor(tmp_path, before, {"llama_model": str(folder), "llm_dtype": precision})[LM]
    assert (found["verdict"] == "error") == is_error
    assert ("fp16" in found["evidence"] and "bf16" in found["remedy"]) == is_error

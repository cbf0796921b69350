"""The entry scripts as a user starts them, on the embedded backbones: train, resume, two ranks, chat, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quickstart import scenes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=2, scenes_per_shard=40, seed=1)
    scenes.write_alignment(folder / "align", num_scenes=40, seed=2)
    return folder


def run(*command):
    """Starts Python anew, as a user does; the other tests here use ``programs``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment
    )


def train(world, stage, *options):
    """The arguments of a short run."""
    data = {1: f"cc_sbu.build_info.storage={world}/shards/*.tar", 2: f"cc_sbu_align.build_info.storage={world}/align"}
    short = [f"max_epoch={3 - stage}", "iters_per_epoch=4", "warmup_steps=0", "batch_size_train=8", "log_freq=1"]
    fixed = [f"datasets.{data[stage]}", f"run.output_dir={world}/stage{stage}", *(f"run.{option}" for option in short)]
    return ["train.py", "--cfg-path", f"train_configs/quickstart_stage{stage}.yaml", "--options", *fixed, *options]


@pytest.fixture(scope="module")
def stage1(world):
    result = run(*train(world, 1, "run.num_workers=2"))
    assert result.returncode == 0, result.stderr
    (folder,) = (world / "stage1").iterdir()
    return folder


def test_stage_1_learns_and_writes(stage1):
    written = {"checkpoint_0.pth", "checkpoint_1.pth", "config.yaml", "log.txt", "report.png"}
    assert written <= {f.name for f in stage1.iterdir()}
    config, *epochs = map(json.loads, (stage1 / "log.txt").read_text().splitlines())
    assert config["config"]["run"]["iters_per_epoch"] == 4
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]


def test_resume_repeats_the_losses_bit_for_bit(world, stage1, programs):
    options = (
        "run.num_workers=2",
        f"run.resume_ckpt_path={stage1}/checkpoint_0.pth",
        f"run.output_dir={world}/resumed",
    )
    result = programs.run(train(world, 1, *options))
    assert result.returncode == 0, result.stderr
    (folder,) = (world / "resumed").iterdir()
    losses = [
        [row["loss"] for row in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())]
        for f in (stage1, folder)
    ]
    assert losses[1] == losses[0][4:]


def test_stage_2_on_two_ranks_then_chat(world, stage1, programs):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = run(*launcher, *train(world, 2, f"model.ckpt={stage1}/checkpoint_1.pth"))
    assert result.returncode == 0, result.stderr
    (folder,) = (world / "stage2").iterdir()
    assert [f.name for f in folder.glob("*.pth")] == ["checkpoint_0.pth"]
    demo = ("demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", "--greedy", "--max-new-tokens", "20")
    ckpt = ("--options", f"model.ckpt={folder}/checkpoint_0.pth")
    picture = world / "align" / "image" / "0.jpg"
    answer = run(*demo, "--image", picture, "--ask", "How many objects are there?", *ckpt)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    typed = f"/image {picture}\nHow many objects are there?\n/image nowhere.jpg\n"
    chat = programs.run([*demo, "--terminal", *ckpt], typed)
    assert chat.stdout.splitlines()[0] == "Received."
    assert chat.stdout.splitlines()[1] == answer.stdout.strip()
    assert "error: 'nowhere.jpg' cannot be read as an image" in chat.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["run.max_epochs=1"], "run.max_epochs. Did you mean 'max_epoch'?"),
        (["model.llama_model=/path/to/vicuna/weights/"], "model.llama_model is still the placeholder"),
        (["run.init_lr=fast"], "run.init_lr is 'fast'"),
        (["run"], "'run' is not of the form"),
    ],
)
def test_a_mistake_ends_in_one_line(world, programs, options, told):
    result = programs.run(train(world, 1, *options))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and told in last
    assert "Traceback" not in result.stderr

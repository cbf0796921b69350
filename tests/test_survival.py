"""Runs that are killed, stopped, damaged or out of disk space: a resumed run equals an uninterrupted one."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import forked
import numpy
import psutil
import pytest
import torch

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.datasets import loader
from minigpt4.datasets.batches import LoadedBatch
from minigpt4.runners import checkpoints
from quickstart import scenes

STEPS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=3, scenes_per_shard=30, seed=1)
    return folder


@pytest.fixture(scope="module")
def command(world):
    def options(output_dir, *more):
        short = ["max_epoch=2", f"iters_per_epoch={STEPS // 2}", "batch_size_train=4", "log_freq=1", "resume=auto"]
        short += ["warmup_steps=4", "save_every_iters=2", f"output_dir={output_dir}", "keep_last=2", *more]
        shards = f"datasets.cc_sbu.build_info.storage={world}/shards/*.tar"
        small_buffer = "datasets.cc_sbu.build_info.shuffle_buffer=20"
        runs = [option if option.startswith(("model.", "datasets.")) else f"run.{option}" for option in short]
        return ["--cfg-path", "train_configs/quickstart_stage1.yaml", "--options", shards, small_buffer, *runs]

    return options


def outcome(output_dir):
    """The files of a finished run: losses and rates by step, epoch means, and the last checkpoint's contents."""
    (folder,) = (
        path.parent for path in output_dir.glob("*/checkpoint_1.pth")
    )  # other folders are of runs killed before their first checkpoint
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    content = torch.load(folder / "checkpoint_1.pth", weights_only=True)
    files = {path.name for path in folder.iterdir()}
    random_state = content["ranks"][0]["random"]
    return {
        "losses": [(row["step"], row["loss"], row["lr"]) for row in rows],
        "epochs": [epoch for epoch in epochs if "epoch" in epoch],
        "model": content["model"],
        "moments": content["optimizer"]["state"],
        "state": content["state"],
        "random": random_state | {"torch": random_state["torch"].tolist()},
        "files": files,
    }


def assert_same(left, right):
    for name in ("losses", "epochs", "state", "random", "files"):
        assert left[name] == right[name], name
    for name, value in right["model"].items():
        assert torch.equal(left["model"][name], value)
    for index, moments in right["moments"].items():
        assert all(torch.equal(left["moments"][index][name], value) for name, value in moments.items())


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The uninterrupted run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert forked.wait(forked.start(command(folder / "out", "num_workers=1"), folder / "log")) == 0, (
        folder / "log"
    ).read_text()
    result = outcome(folder / "out")
    assert [step for step, *_ in result["losses"]] == list(range(STEPS))
    assert result["files"] == {"config.yaml", "log.txt", "metrics.jsonl", "checkpoint_step_16.pth", "checkpoint_1.pth"}
    return result, time.monotonic() - begin


def test_killed_at_ten_random_moments(command, whole, tmp_path):
    expected, seconds = whole
    rng, killed, round_number = random.Random(7), 0, 0
    while killed < 10:
        output_dir, round_number = tmp_path / f"out{round_number}", round_number + 1
        while True:
            pid = forked.start(command(output_dir, "num_workers=1"), tmp_path / "log")
            status = forked.kill_after(pid, rng.uniform(0.1, 0.8) * seconds)
            assert status in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
            if status == 0:
                break
            killed += 1
        assert_same(outcome(output_dir), expected)


def test_a_signal_ends_the_wait_for_data(command, whole, world, tmp_path):
    stalling = ",".join(f"pipe:cat {shard}; sleep 600" for shard in sorted(world.glob("shards/*.tar")))
    storage = [f"datasets.cc_sbu.build_info.{option}" for option in (f"storage=[{stalling}]", "timeout=600")]
    pid = forked.start(command(tmp_path / "out", "num_workers=0", "save_every_iters=null", *storage), tmp_path / "log")
    process, num_steps = psutil.Process(pid), [-1, 0]
    try:
        for _ in range(600):
            if num_steps[-1] >= 2 and num_steps[-1] == num_steps[-8:][0]:  # it stalls, as the shard does
                break
            time.sleep(0.1)
            num_steps.append(sum(file.read_text().count("\n") for file in tmp_path.glob("out/*/metrics.jsonl")))
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        if process.is_running():
            process.kill()
    assert "Stopped at step" in (tmp_path / "log").read_text()
    assert forked.wait(forked.start(command(tmp_path / "out", "num_workers=0"), tmp_path / "log")) == 0
    assert_same(outcome(tmp_path / "out"), whole[0])  # one worker reads in the same order as none


class Signalling(LoadedBatch):
    """Sends a signal when the loader, which has counted the batch, hands it over."""

    @property
    def skipped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return self[1]


@pytest.mark.parametrize("moment", ["counted", "seeding", "between steps"])
def test_a_signal_while_a_batch_is_loaded(command, whole, tmp_path, moment):
    """It counts as read and is trained on, or neither; the random state is that of the training."""
    arguments = command(tmp_path / "out", "num_workers=0", "save_every_iters=null")

    def signal_once():
        from minigpt4.runners import RunnerBase

        seed, epoch, load = numpy.random.seed, loader.TrainLoader.iter_epoch, loader._load

        def load_and_signal(*arguments):
            for number, loaded in enumerate(load(*arguments)):
                yield Signalling(*loaded) if number == 2 and moment == "counted" else loaded

        def train_step(self, *arguments, **kwargs):
            def seed_and_signal(number):
                numpy.random.seed = seed
                seed(number)
                os.kill(os.getpid(), signal.SIGTERM)

            if self.state.step == 2 and moment == "seeding":
                numpy.random.seed = seed_and_signal
            return step(self, *arguments, **kwargs)

        def iter_epoch(self, *arguments):
            for number, batch in enumerate(epoch(self, *arguments)):
                yield batch
                if number == 2 and moment == "between steps":
                    os.kill(os.getpid(), signal.SIGTERM)

        step, RunnerBase.train_step = RunnerBase.train_step, train_step
        loader.TrainLoader.iter_epoch, loader._load = iter_epoch, load_and_signal

    assert forked.wait(forked.start(arguments, tmp_path / "log", signal_once)) == 0
    assert "Stopped at step 3" in (tmp_path / "log").read_text()
    assert forked.wait(forked.start(command(tmp_path / "out", "num_workers=0"), tmp_path / "log")) == 0
    assert_same(outcome(tmp_path / "out"), whole[0])


def die_inside(moment):
    """Lets this process kill itself in the middle of writing its fourth checkpoint."""
    calls, real_save, real_replace = [], torch.save, Path.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save(content, file):
        calls.append(file)
        real_save(content, file)
        file.flush()
        if len(calls) == 4 and moment == "half written":
            os.truncate(file.name, os.path.getsize(file.name) // 2)
            die()
        if len(calls) == 4 and moment == "written":
            die()

    def replace(self, target):
        is_it = len(calls) == 4 and self.suffix == ".tmp" and target.suffix == ".pth"
        result = real_replace(self, target)
        if is_it and moment == "renamed":
            die()
        return result

    def prune(*_):
        if len(calls) == 4:
            die()

    torch.save, Path.replace = save, replace
    if moment == "before pruning":
        checkpoints.prune = prune


@pytest.mark.parametrize("moment", ["half written", "written", "renamed", "before pruning"])
def test_killed_inside_a_checkpoint_write(command, whole, tmp_path, moment):
    arguments = command(tmp_path / "out", "num_workers=1")
    pid = forked.start(arguments, tmp_path / "log", lambda: die_inside(moment))
    assert forked.wait(pid) == -signal.SIGKILL
    assert forked.wait(forked.start(arguments, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert_same(outcome(tmp_path / "out"), whole[0])
    resumed = re.findall(r"Resuming from .*checkpoint_(\w+)\.pth", (tmp_path / "log").read_text())
    assert resumed == ["step_8" if moment in ("renamed", "before pruning") else "step_6"]


@pytest.mark.parametrize("number", list(dist_utils.STOP_SIGNALS))
def test_a_signal_ends_the_run_with_a_checkpoint(command, whole, tmp_path, number):
    arguments = command(tmp_path / "out", "num_workers=1", "save_every_iters=null")

    def signal_at_step_5():
        from minigpt4.runners import RunnerBase

        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        step = RunnerBase.train_step

        def train_step(self, *arguments, **kwargs):
            if self.state.step == 5:  # twice, as torchrun repeats what a terminal sent it and its ranks
                for worker in psutil.Process().children():  # as a scheduler or a terminal does
                    worker.send_signal(number)
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            return step(self, *arguments, **kwargs)

        RunnerBase.train_step = train_step

    assert forked.wait(forked.start(arguments, tmp_path / "log", signal_at_step_5)) == 0
    assert "Stopped at step 6" in (tmp_path / "log").read_text()
    assert [file.name for file in (tmp_path / "out").glob("*/*.pth")] == ["checkpoint_step_6.pth"]
    assert forked.wait(forked.start(command(tmp_path / "out", "num_workers=1"), tmp_path / "log")) == 0
    assert_same(outcome(tmp_path / "out"), whole[0])


@pytest.fixture(scope="module")
def run_of_8_steps(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    arguments = command(folder / "out", "num_workers=0", "max_epoch=1", "keep_last=null")
    assert forked.wait(forked.start(arguments, folder / "log")) == 0, (folder / "log").read_text()
    return folder / "out"


@pytest.fixture
def finished(run_of_8_steps, tmp_path):
    """The folder of a run of 8 steps."""
    (folder,) = shutil.copytree(run_of_8_steps, tmp_path / "out").iterdir()
    return folder


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "weights only"])
def test_damaged_checkpoints_are_skipped_and_logged(finished, caplog, damage):
    assert checkpoints.newest(finished.parent).name in ("checkpoint_0.pth", "checkpoint_step_8.pth")
    for name in ("checkpoint_0.pth", "checkpoint_step_8.pth"):
        path, data = finished / name, bytearray((finished / name).read_bytes())
        if damage == "cut":
            path.write_bytes(data[: len(data) - 1000])
        elif damage == "bits":
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        elif damage == "text":
            path.write_text("no weights")
        else:
            torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)
    assert checkpoints.newest(finished.parent).name == "checkpoint_step_6.pth"
    assert caplog.text.count("Skipping") == 2 and str(finished / "checkpoint_0.pth") in caplog.text


def test_a_finished_run_is_not_continued(command, finished, tmp_path):
    before = (finished / "metrics.jsonl").read_text()
    arguments = command(tmp_path / "out", "num_workers=0", "max_epoch=1", "keep_last=null")
    assert forked.wait(forked.start(arguments, tmp_path / "log")) == 0
    assert (finished / "metrics.jsonl").read_text() == before and len(list(finished.parent.iterdir())) == 1
    assert "Nothing is left to train" in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_full_disk_keeps_the_old_checkpoints(command, finished, tmp_path):
    """A limit on the size of files replaces a full disk: with both, a write fails half way with an OSError."""
    newest = checkpoints.newest(finished.parent)
    content = newest.read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    log = tmp_path / "log2"
    assert forked.wait(forked.start(command(tmp_path / "out", "num_workers=0", "keep_last=1"), log, limit)) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: run.output_dir: ") and "cannot be written" in last and "keep_last" in last
    assert "Traceback" not in log.read_text()
    assert list(finished.glob("*.pth")) == [newest] and newest.read_bytes() == content
    assert not list(finished.glob("*.tmp")) and not list(finished.glob("lock*"))


def test_a_read_only_output_folder_is_reported(command, tmp_path):
    (tmp_path / "file").write_text("")  # no folder can be created below it, not even by root
    assert forked.wait(forked.start(command(tmp_path / "file" / "out"), tmp_path / "log")) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: run.output_dir: ") and "cannot be created or written" in last


def test_an_unreadable_resume_file_is_reported(command, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    options = ("resume=null", f"resume_ckpt_path={tmp_path}/x.pth")
    assert forked.wait(forked.start(command(tmp_path / "out", *options), tmp_path / "log")) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith(f"error: run.resume_ckpt_path: {tmp_path}/x.pth") and "cannot be read as weights" in last


def test_a_failing_write_reports_its_cause(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"run\.output_dir: .*checkpoint_0\.pth cannot be written"):
        checkpoints.write({"model": {}}, tmp_path / "checkpoint_0.pth")

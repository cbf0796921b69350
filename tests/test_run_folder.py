"""What a run keeps in its folder: checkpoints by step, room on a full disk, logs that end where it resumes."""

import errno
import json
import os
import shutil
import stat
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recorded_training import run_of

from minigpt4.common.errors import UserError
from minigpt4.common.schema import RunConfig
from minigpt4.runners import checkpoints, run_folder
from minigpt4.runners.checkpoints import TrainState
from minigpt4.runners.progress import Tracker
from minigpt4.runners.run_folder import append_line, truncate_logs

CONTENT = {"model": {"w": torch.zeros(5000)}}


@pytest.fixture
def train(make_runner):
    """Trains the recorded batches, two iterations per epoch; returns the folder."""

    def run(max_epoch, **changes):
        settings = {"iters_per_epoch": 2, "max_epoch": max_epoch, "resume": "auto", "log_freq": 1, **changes}
        runner = make_runner(run_of("stage1", **settings))
        runner.train()
        return runner.output_dir

    return run


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint*"))


def stored(folder, name, step, epoch=0):
    path = folder / name
    torch.save(CONTENT | {"state": {"step": step, "epoch": epoch}}, path)
    return path


# the order of checkpoints


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_newest_checkpoint_is_kept_after_the_clock_went_back(train, keep_last):
    folder = train(1)
    for path in folder.glob("checkpoint_*.pth"):
        os.utime(path, (4e9, 4e9))
    train(3, keep_last=keep_last)
    assert names(folder) == ["checkpoint_1.pth", "checkpoint_2.pth"][-keep_last:]


def test_a_checkpoint_written_while_the_lock_was_waited_for_is_resumed(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    folder.mkdir()
    stored(folder, "checkpoint_step_1.pth", 1)
    monkeypatch.setattr(run_folder, "RunLock", lambda held: stored(held, "checkpoint_step_2.pth", 2))
    opened = run_folder.open_folder(RunConfig(output_dir=str(tmp_path), resume="auto"), "job", None)
    assert opened[:2] == (folder, folder / "checkpoint_step_2.pth")


def test_pruning_keeps_the_last_by_step_the_best_and_unknown_files(tmp_path):
    for name, step, epoch in (("checkpoint_9", 3, 0), ("checkpoint_0", 4, 1), ("checkpoint_step_4", 4, 0)):
        stored(tmp_path, f"{name}.pth", step, epoch)
    best, newest, later = (
        stored(tmp_path, f"checkpoint_{name}.pth", step) for name, step in (("best", 1), ("1", 6), ("x", 9))
    )
    (tmp_path / "checkpoint_mine.pth").write_text("weights of somebody")
    everything = set(tmp_path.iterdir())
    assert checkpoints.prune(tmp_path, None, newest) == 0 and set(tmp_path.iterdir()) == everything
    assert checkpoints.prune(tmp_path, 2, newest) == 2
    removed = {path.name for path in everything - set(tmp_path.iterdir())}
    assert removed == {"checkpoint_9.pth", "checkpoint_step_4.pth"} and best.exists() and later.exists()
    assert checkpoints.prune(tmp_path, 1, tmp_path / "checkpoint_mine.pth") == 0  # its step is unknown


# a full disk; /dev/full has no space left


def fill(folder, name):
    """Lets the next write of a checkpoint fail for lack of space."""
    (folder / name).with_suffix(".tmp").symlink_to("/dev/full")


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [5]), (2, [5]), (3, [4, 5])])
def test_a_checkpoint_for_which_there_is_no_space_replaces_older_ones(tmp_path, keep_last, kept):
    for step in range(1, 6):
        stored(tmp_path, f"checkpoint_step_{step}.pth", step)
    fill(tmp_path, "checkpoint_step_6.pth")
    checkpoints.write(CONTENT, tmp_path / "checkpoint_step_6.pth", keep_last)
    assert names(tmp_path) == [f"checkpoint_step_{step}.pth" for step in (*kept, 6)]


def test_an_exceeded_quota_is_a_full_disk(tmp_path, monkeypatch):
    """Network file systems report it when a file is flushed."""
    for step in range(1, 4):
        stored(tmp_path, f"checkpoint_step_{step}.pth", step)
    flush, errors = os.fsync, [OSError(errno.EDQUOT, "Disk quota exceeded")]

    def fsync(descriptor):
        if errors:
            raise errors.pop()
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints.write(CONTENT, tmp_path / "checkpoint_step_4.pth", keep_last=2)
    assert names(tmp_path) == ["checkpoint_step_3.pth", "checkpoint_step_4.pth"]


def test_the_last_intact_checkpoint_makes_no_room(tmp_path):
    intact, damaged = (stored(tmp_path, f"checkpoint_step_{step}.pth", step) for step in (1, 2))
    content = bytearray(damaged.read_bytes())
    content[-3000] ^= 1  # of the tensor, so that its step is still known
    damaged.write_bytes(content)
    path = tmp_path / "checkpoint_step_3.pth"
    fill(tmp_path, path.name)
    with pytest.raises(UserError) as raised:
        checkpoints.write(CONTENT, path, 1)
    assert intact.exists() and not path.exists() and not path.with_suffix(".tmp").exists()
    checkpoints.write(CONTENT, path, 1)
    needed, free = f"{path.stat().st_size:,}", r"[\d,]+"
    raised.match(
        rf"run\.output_dir: {path} cannot be written: no space left: {needed} bytes are needed, {free} are avai"
    )
    raised.match("run.keep_last, then resume with run.resume: auto. See docs/TROUBLESHOOTING.md#disk-full")


def test_resuming_on_a_full_disk_first_deletes_what_may_go(train, monkeypatch):
    folder = train(4)
    expected = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = []
    monkeypatch.setattr("minigpt4.runners.run_folder.truncate_logs", lambda folder, _: seen.append(names(folder)))
    train(4, keep_last=2)
    assert seen == [["checkpoint_2.pth", "checkpoint_3.pth"]]
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == expected


def test_a_resumed_run_does_not_keep_its_checkpoint_open_when_it_is_pruned(train):
    folder = train(1)
    train(2, keep_last=1)
    assert names(folder) == ["checkpoint_1.pth"]
    assert str(folder / "checkpoint_0.pth") not in Path("/proc/self/maps").read_text()


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints.write(CONTENT, tmp_path / "checkpoint_0.pth")
    assert names(tmp_path) == ["checkpoint_0.pth"]


@pytest.mark.parametrize(("number", "is_error"), [(errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_a_file_that_cannot_be_flushed_is_an_error_unless_none_can_be(tmp_path, monkeypatch, number, is_error):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if is_error:
        with pytest.raises(UserError, match="cannot be written"):
            checkpoints.write(CONTENT, tmp_path / "checkpoint_0.pth")
    else:
        checkpoints.write(CONTENT, tmp_path / "checkpoint_0.pth")
    assert names(tmp_path) == ([] if is_error else ["checkpoint_0.pth"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_log_that_cannot_be_written_ends_the_run_with_one_sentence(train, name):
    folder = train(1)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{folder / name} cannot be written: no space left: \d+ bytes are needed"):
        train(2)
    assert not list(folder.glob("lock_*"))


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog, failing):
    def fail(*_, **__):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    run = SimpleNamespace(**{"log": lambda *_, **__: None, "finish": lambda: None, failing: fail})
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    tracker = Tracker(RunConfig(tracker="wandb"), tmp_path, {})
    for step in range(2):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert caplog.text.count("run.tracker failed") == 1 and "Broken pipe" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_that_could_not_be_read_again_is_refused_when_it_is_written(tmp_path):
    checkpoints.write({"config": {"labels": {True: 1, ("a", 2): 0}}}, path := tmp_path / "checkpoint_0.pth")
    assert torch.load(path, weights_only=True)["config"]["labels"] == {True: 1, ("a", 2): 0}
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"checkpoint_0.pth could not be read again: it holds .*Counter"):
        checkpoints.write({"state": Counter("ab")}, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# logs


def test_numbers_that_are_not_finite_are_null(tmp_path):
    append_line(tmp_path / "log.txt", {"loss": float("nan"), "other": -float("inf"), "epoch": 1, "path": Path("x")})
    assert (tmp_path / "log.txt").read_text() == '{"loss": null, "other": null, "epoch": 1, "path": "x"}\n'


ROWS = [{"step": 1, "lr": 1.0}, {"step": 2, "lr": 1.0}, {"step": 2, "val loss": 1.0}, {"step": 3, "lr": 1.0}]


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        (TrainState(epoch=1, iteration=0, step=3), 3),  # the epoch was validated
        (TrainState(epoch=0, iteration=3, step=3), 2),  # it has not been
        (TrainState(epoch=1, iteration=1, step=4), 4),
        (TrainState(), 0),
    ],
)
def test_metrics_end_where_the_run_resumes(tmp_path, state, kept):
    lines = [json.dumps(row) + "\n" for row in ROWS]
    damage = "\0" * 20 + '\n["a"]\n{"step": 7'
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + damage)
    truncate_logs(tmp_path, state)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:kept])


def test_damage_inside_a_log_costs_no_later_line(tmp_path):
    text = '{"epoch": 0}\n' + "\0" * 9 + '\n{"epoch": 1}\n'
    (tmp_path / "log.txt").write_text(text + '{"epoch": 2}\n')
    truncate_logs(tmp_path, TrainState(epoch=2))
    assert (tmp_path / "log.txt").read_text() == text


def test_a_folder_that_is_gone_is_reported(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No such file"):
        append_line(tmp_path / "metrics.jsonl", {})


def test_a_placeholder_is_no_folder():
    with pytest.raises(UserError, match=r"run\.output_dir is still the placeholder '/path/to/save_checkpoint'"):
        run_folder.open_folder(RunConfig(output_dir="/path/to/save_checkpoint"), "job", None)


def test_a_file_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.output_dir: .*/file/out cannot be created or written"):
        run_folder.check_output_dir(RunConfig(output_dir=f"{tmp_path}/file/out"))

"""The lock on a run's folder: who is refused, who takes over, on one machine and on several."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import forked
import pytest
from behaviour import align_section, folder_of, wait, write_config, write_pairs

from minigpt4.common.errors import UserError
from minigpt4.runners import lock
from minigpt4.runners.lock import RunLock


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.2)


def locks(folder):
    return sorted(folder.glob("lock_*"))


def lock_of(folder, pid, ticks, host=None, namespace=None):
    """Writes the lock file of another process."""
    names = (host or socket.gethostname(), namespace or lock._namespace(), pid, ticks, "20260131120000")
    path = folder / ("lock_" + "_".join(map(str, names)))
    path.touch()
    return path


# through train.py


@pytest.fixture
def arguments(tmp_path):
    section = align_section(write_pairs(tmp_path / "pairs"))
    run = {"iters_per_epoch": 6, "save_every_iters": 2, "resume": "auto", "output_dir": str(tmp_path / "out")}
    return ["--cfg-path", write_config(tmp_path / "run.yaml", run, section)]


@pytest.fixture
def waiting(arguments, tmp_path):
    """The process of a run that waits after three steps and a checkpoint, until the file "go on" exists."""
    go_on, is_waiting = tmp_path / "go on", tmp_path / "waiting"

    def before():
        from minigpt4.runners import RunnerBase

        step = RunnerBase.train_step

        def train_step(self, *arguments, **kwargs):
            while self.state.step == 3 and not go_on.exists():
                is_waiting.touch()
                time.sleep(0.02)
            return step(self, *arguments, **kwargs)

        RunnerBase.train_step = train_step

    pid = forked.start(arguments, tmp_path / "log", before)
    deadline = time.monotonic() + 60
    while not is_waiting.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        forked.wait(pid)


def test_a_second_run_of_the_same_command_is_refused(arguments, waiting, tmp_path):
    folder = folder_of(tmp_path / "out")
    metrics = (folder / "metrics.jsonl").read_text()
    assert wait(forked.start(arguments, tmp_path / "log2"), 60) == 1
    last = (tmp_path / "log2").read_text().splitlines()[-1]
    assert last.startswith(
        f"error: run.output_dir: {folder} is in use by process {waiting} on {socket.gethostname()}, sin"
    )
    assert (folder / "metrics.jsonl").read_text() == metrics and len(locks(folder)) == 1
    (tmp_path / "go on").touch()
    assert wait(waiting, 60) == 0
    assert (folder / "checkpoint_0.pth").exists() and not locks(folder)


def test_after_a_kill_the_same_command_resumes_at_once(arguments, waiting, tmp_path):
    folder = folder_of(tmp_path / "out")
    os.kill(waiting, signal.SIGKILL)  # it stays a zombie until its parent waits for it
    os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOWAIT)
    assert len(locks(folder)) == 1
    (tmp_path / "go on").touch()
    assert wait(forked.start(arguments, tmp_path / "log2"), 60) == 0, (tmp_path / "log2").read_text()
    assert "checkpoint_step_2.pth" in (tmp_path / "log2").read_text() and not locks(folder)


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(waiting, tmp_path):
    folder = folder_of(tmp_path / "out")
    locks(folder)[0].unlink()
    (tmp_path / "go on").touch()
    assert wait(waiting, 60) == 1
    assert "another process has taken over this run" in (tmp_path / "log").read_text().splitlines()[-1]
    assert [file.name for file in folder.glob("*.pth")] == ["checkpoint_step_2.pth"]


# on this machine


def test_the_first_namespace_of_process_ids_is_told_apart_between_machines():
    """Its number is the same on all of them, and so may their names be."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    assert lock._namespace() == f"{boot[:8]}-{os.stat('/proc/self/ns/pid').st_ino}"


def test_a_process_id_that_is_used_again_does_not_hold_the_lock(tmp_path):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:  # until its input is closed
        held = lock_of(tmp_path, other.pid, ticks := lock._ticks(other.pid))
        with pytest.raises(UserError, match=f"process {other.pid} on .* since 2026-01-31 12:00:00; .*delete {held}"):
            RunLock(tmp_path)
        assert locks(tmp_path) == [held]
        held.rename(reused := tmp_path / held.name.replace(f"_{ticks}_", "_1_"))
        mine = RunLock(tmp_path)
        assert not reused.exists() and locks(tmp_path) == [mine.path]


def test_the_lock_ends_with_its_release_or_its_last_reference(tmp_path):
    first = RunLock(tmp_path)
    first.check()
    first.release()
    assert not locks(tmp_path)
    with pytest.raises(UserError, match="another process has taken over"):
        first.check()
    second = RunLock(tmp_path)
    assert len(locks(tmp_path)) == 1
    del second
    assert not locks(tmp_path)


def test_a_forked_process_does_not_release_the_lock(tmp_path):
    mine = RunLock(tmp_path)
    pid = os.fork()
    if pid == 0:
        mine.release()
        os._exit(0)
    assert wait(pid, 60) == 0
    mine.check()


def test_other_files_do_not_matter(tmp_path):
    for name in ("lock_", "lock_x", "lock_a_b_c_d_e", "lock_a_b_1_2_99999999999999"):
        (tmp_path / name).touch()
    RunLock(tmp_path).check()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"run\.output_dir: .* cannot be created \(No such file"):
        RunLock(tmp_path / "missing")


# on other machines, and in containers


@pytest.mark.parametrize("place", [{"host": "other"}, {"namespace": "1"}], ids=["machine", "container"])
def test_a_process_elsewhere_that_gives_signs_of_life_holds_the_lock(tmp_path, place):
    held = lock_of(tmp_path, 1, 1, **place)
    is_over = threading.Event()

    def live():
        while not is_over.wait(0.02):
            os.utime(held)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="is in use by process 1 on"):
            RunLock(tmp_path)
    finally:
        is_over.set()
        thread.join()
    assert held.exists()


def test_a_process_elsewhere_that_is_silent_loses_the_lock(tmp_path, monkeypatch):
    held = lock_of(tmp_path, 1, 1, host="other")
    os.utime(held, (1, 1))
    mine = RunLock(tmp_path)
    assert locks(tmp_path) == [mine.path]
    mine.release()
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    lock_of(tmp_path, 1, 1, host="other")  # has just been touched: this waits
    mine = RunLock(tmp_path)
    assert locks(tmp_path) == [mine.path]


def test_signs_of_life_are_given_until_the_release(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    mine = RunLock(tmp_path)
    os.utime(mine.path, (1, 1))
    deadline = time.monotonic() + 10
    while mine.path.stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)

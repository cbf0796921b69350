"""A lock on a run's folder, so that no two processes write into it; it works on network file systems, too."""

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from minigpt4.common.errors import UserError
from minigpt4.common.utils import now

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # without a heartbeat, a process on another machine is dead; NFS may show it a minute late
GRACE_SECONDS = 10.0  # a process of this machine that was killed may still be ending
_PREFIX = "lock_"


class Holder(NamedTuple):
    """A process that uses a folder, as the name of its lock file says."""

    host: str
    namespace: str  # of process ids: machines and containers may share the name of a host
    pid: int
    ticks: str  # when it began: process ids are used again
    since: str


class RunLock:
    """This process's lock on a folder, until ``release``, the end of the process, or the last reference to it.

    Each process creates a file of its own, whose name identifies it, and then looks for files of others: it has the
    lock if all their processes are dead. So no operation has to be atomic, the file takes no space on a full disk, and
    any process can delete the file of a dead one. A thread touches the file regularly, as a sign of life for other
    machines.

    Raises:
        UserError: another process uses the folder, or no file can be created there.
    """

    def __init__(self, folder: Path) -> None:
        pid = os.getpid()
        me = Holder(socket.gethostname(), _namespace(), pid, _ticks(pid), now())
        self.path = folder / (_PREFIX + "_".join(map(str, me)))
        try:
            self.path.touch()
        except OSError as error:
            raise UserError(f"run.output_dir: {self.path} cannot be created ({error.strerror}).") from error
        is_over = threading.Event()
        self.release = weakref.finalize(self, _release, self.path, is_over, pid)
        threading.Thread(target=_beat, args=(self.path, is_over), daemon=True).start()
        try:
            _wait_for_others(self.path, me)
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Raises UserError if another process has taken the folder over, as after a long suspension of this one."""
        if not self.path.exists():
            raise UserError(
                f"run.output_dir: {self.path} is gone: another process has taken over this run, or its folder was "
                "deleted. Nothing more is written by this one."
            )


def _release(path: Path, is_over: threading.Event, pid: int) -> None:
    is_over.set()
    if os.getpid() == pid:  # and not a fork
        with contextlib.suppress(OSError):
            path.unlink()


def _beat(path: Path, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_SECONDS):
        try:
            os.utime(path)
        except FileNotFoundError:
            return
        except OSError:  # the file server may be back in time
            continue


def _wait_for_others(mine: Path, me: Holder) -> None:
    """Returns when no other process uses the folder; a UserError as soon as one is known to be alive."""
    begin, first_beats = time.monotonic(), {}
    patience = GRACE_SECONDS * (1 + me.pid % 8 / 8)  # of two that start at the same moment, one gives up first
    while others := _others(mine, me):
        for path, holder in others:
            if holder[:2] == me[:2]:
                is_alive = time.monotonic() - begin > patience
            else:
                if path not in first_beats:
                    logging.info("Waiting for a sign of life of process %d on %s.", holder.pid, holder.host)
                beat = _last_beat(path)
                is_alive = first_beats.setdefault(path, beat) != beat
            if is_alive:
                raise UserError(
                    f"run.output_dir: {mine.parent} is in use by process {holder.pid} on {holder.host}, since "
                    f"{_time(holder.since)}; wait until it ends, stop it, or set another run.output_dir; to "
                    f"evaluate meanwhile, set run.resume_ckpt_path. If there is no such process, delete {path}."
                )
        time.sleep(0.1)


def _others(mine: Path, me: Holder) -> list[tuple[Path, Holder]]:
    """The lock files of processes that are or may be alive; those of dead ones are deleted."""
    with contextlib.suppress(OSError):
        os.utime(mine)
    current, found = _last_beat(mine), []  # the file server's clock, by which all beats are stamped
    for path in mine.parent.glob(f"{_PREFIX}*"):
        holder = _parse(path.name)
        if holder is None or holder[:4] == me[:4]:
            continue
        is_local = holder[:2] == me[:2]
        if _is_running(holder) if is_local else current - _last_beat(path) < STALE_SECONDS:
            found.append((path, holder))
        else:
            logging.warning("Process %d on %s, which used this run's folder, is gone.", holder.pid, holder.host)
            path.unlink(missing_ok=True)
    return found


def _parse(name: str) -> Holder | None:
    with contextlib.suppress(ValueError):  # not a file of ours
        host, namespace, pid, ticks, since = name.removeprefix(_PREFIX).rsplit("_", 4)
        return Holder(host, namespace, int(pid), ticks, _time(since) and since)
    return None


def _time(text: str) -> datetime:
    return datetime.strptime(text, "%Y%m%d%H%M%S")


def _last_beat(path: Path) -> float:
    with contextlib.suppress(OSError), path.open() as file:  # opened, as NFS caches what stat would return
        return os.fstat(file.fileno()).st_mtime
    return 0.0


def _namespace() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]  # the first namespace has one number everywhere
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return ""  # not Linux


def _ticks(pid: int) -> str:
    """When a process began, in ticks since the system did, which no change of the clock moves; empty if unknown."""
    with contextlib.suppress(OSError):  # not Linux, or hidden from other users
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if state in "ZX" else fields[18]  # until its parent asks for the status, it has a number
    return ""


def _is_running(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return _ticks(holder.pid) in ("", holder.ticks)

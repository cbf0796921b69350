"""Checkpoints of a run: written atomically, ordered by step, found again, pruned."""

import contextlib
import errno
import functools
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt4.common import pickles, weights
from minigpt4.common.errors import UserError, see

RESUME_KEY = "run.resume_ckpt_path"
BEST = "checkpoint_best.pth"
PATTERN = "checkpoint_*.pth"
PARTIAL = ".tmp"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of file systems without fsync


@dataclass
class TrainState:
    """Counters of a run, stored in its checkpoints."""

    epoch: int = 0  # in progress, or next
    iteration: int = 0  # finished iterations of this epoch
    step: int = 0  # finished iterations of all epochs
    best_metric: float = -float("inf")
    num_nonfinite: int = 0  # updates skipped because of a non-finite loss
    num_nonfinite_in_a_row: int = 0


def write(content: dict[str, Any], path: Path, keep_last: int | None = None) -> None:
    """Writes a checkpoint atomically: after a crash at any moment, ``path`` has its old or its new content.

    On a full disk, older checkpoints that ``keep_last`` allows to delete make room; the newest intact one never does.

    Raises:
        UserError: the disk is full or read-only.
    """
    partial = path.with_suffix(PARTIAL)
    try:
        with partial.open("wb") as file:  # with a path, torch would hide the system's error number
            torch.save(content, file)
        pickles.check(partial)  # a run could not resume from a file that reading refuses
        _sync(partial)
        partial.replace(path)
    except ValueError as error:
        partial.unlink()
        message = f"run.output_dir: {path} could not be read again: {error}. The configuration and the states of own "
        raise UserError(f"{message}data sets, loaders and tasks have to be plain values and tensors.") from error
    except (OSError, RuntimeError) as error:  # torch's writer wraps the system's error
        with contextlib.suppress(OSError):
            partial.unlink()
        is_full = _system_error(error).errno in _NO_SPACE
        intact = newest(path.parent, PATTERN) if is_full and keep_last is not None else None
        if intact is not None and prune(path.parent, max(1, keep_last - 1), intact):
            return write(content, path)
        torch.save(content, counter := _Counter())
        raise unwritable(path, error, counter.size) from error
    with contextlib.suppress(OSError):  # the file is complete
        _sync(path.parent)  # makes the new name durable


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError:
    """The error of the system from which an exception arose."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return OSError()


class _Counter:
    """Stands for a file, to learn its size."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def unwritable(path: Path, error: Exception, size: int) -> UserError:
    """Returns what to raise when a file of a run cannot be written; ``size`` is in bytes, 0 if unknown."""
    system = _system_error(error)
    cause = (system.strerror or str(error)).strip().split("\n")[0][:160]
    if system.errno in _NO_SPACE:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            needed = f"{size:,} bytes are needed, " if size else ""
            cause = f"no space left: {needed}{free:,} are available ({cause})"
    return UserError(
        f"run.output_dir: {path} cannot be written: {cause}. The newest complete checkpoint is unchanged. Free some "
        "space, or set or lower run.keep_last, then resume with run.resume: auto." + see("disk-full")
    )


def newest(folder: Path, pattern: str = f"*/{PATTERN}") -> Path | None:
    """Returns the intact checkpoint with the highest step below a ``run.output_dir``, None if there is none."""
    for path in reversed(_by_step(folder.glob(pattern))):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch.load does not verify checksums
                return path
        logging.warning("Skipping a damaged checkpoint: the contents of %s do not match their checksums.", path)
    return None


def _by_step(paths: Iterable[Path]) -> list[Path]:
    """The checkpoints among ``paths`` that hold a step, the best one excepted, from the lowest step to the highest.

    Times of files would tell nothing: clocks are set back, and copies are younger than their originals.
    """
    positions = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by another run
            status = path.stat()
            positions[path] = _position(path, status.st_ino, status.st_size, status.st_mtime_ns)
    known = [path for path, position in positions.items() if position is not None]
    return sorted(known, key=lambda path: (positions[path], path))


@functools.lru_cache(maxsize=4096)
def _position(path: Path, *_version: int) -> tuple[int, int] | None:
    """Step and epoch that a file holds; None, which is logged, if it is damaged or has weights only."""
    if path.name == BEST:
        return None
    try:
        state = weights.read_file(path, "run.resume")["state"]
        return int(state["step"]), int(state["epoch"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        logging.warning("Skipping %s, which is damaged or has weights only (%s).", path, error)
        return None


def prune(folder: Path, keep_last: int | None, intact: Path) -> int:
    """Removes checkpoints older than ``intact``, so that ``keep_last`` remain with it, and returns their number.

    Neither the best one is removed, nor a file without a step, nor one with a higher step, which is of another run.
    """
    files = _by_step(folder.glob(PATTERN)) if keep_last is not None else []
    if intact not in files:
        return 0
    older = files[: files.index(intact)]
    removed = older[: max(0, len(older) - (keep_last - 1))]
    for path in removed:
        path.unlink(missing_ok=True)
    return len(removed)

"""Checkpoint files: written whole or not at all, found again, pruned."""

import contextlib
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from minigpt4.common import weights
from minigpt4.common.errors import UserError, see

BEST = "checkpoint_best.pth"
_UNFINISHED = ".tmp"


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a reader, also after a crash at any moment, finds the whole file or none.

    Raises:
        UserError: the disk is full or may not be written; what was there before stays.
    """
    unfinished = path.with_suffix(_UNFINISHED)
    try:
        torch.save(content, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to be on the disk
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer wraps what the system says
        with contextlib.suppress(OSError):
            unfinished.unlink()
        cause = str(error.__cause__ or error).strip().split("\n")[0][:160]
        raise UserError(
            f"run.output_dir: {path} cannot be written ({cause}); earlier checkpoints are as they were. Make room, or "
            "set run.keep_last, then go on with run.resume: auto." + see("disk-full")
        ) from error


def newest(output_dir: Path) -> Path | None:
    """The complete checkpoint that has got furthest below a ``run.output_dir``, None where there is none.

    Damaged ones are named in the log and passed over.
    """
    found = []
    for path in sorted(output_dir.glob("*/checkpoint_*.pth")):
        if path.name != BEST:
            try:
                content = weights.read_file(path, "run.resume")
            except UserError as error:
                logging.warning("Passing over a damaged checkpoint. %s", error)
                continue
            state = content.get("state")
            if "optimizer" in content and isinstance(state, dict) and isinstance(state.get("step"), int):
                found.append((state["step"], path.stat().st_mtime_ns, path))
            else:
                logging.warning("Passing over %s, which holds weights alone.", path)
    for _, _, path in sorted(found, reverse=True):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch reads bytes that were changed on the disk without a word
                return path
        logging.warning("Passing over a damaged checkpoint: %s does not have the contents it was written with.", path)
    return None


def prune(folder: Path, keep_last: int | None) -> None:
    """Removes all but the last ``keep_last`` checkpoints of a folder, and never the best."""
    if keep_last is not None:
        files = [path for path in folder.glob("checkpoint_*.pth") if path.name != BEST]
        for path in sorted(files, key=lambda file: file.stat().st_mtime_ns)[:-keep_last]:
            path.unlink(missing_ok=True)


def take_back(folder: Path, epoch: int, step: int) -> None:
    """Brings a run's folder to where a checkpoint was written: later lines of its logs and unfinished files go."""
    for path in folder.glob(f"checkpoint_*{_UNFINISHED}"):
        path.unlink()
    for name, key, limit in (("metrics.jsonl", "step", step), ("log.txt", "epoch", epoch)):
        path = folder / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line).get(key, -1) < limit]
            unfinished = path.with_suffix(_UNFINISHED)
            unfinished.write_text("".join(kept), encoding="utf-8")
            unfinished.replace(path)

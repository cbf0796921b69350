"""A run on the disk: its folder, and checkpoints that are written whole or not at all, found again, pruned."""

import contextlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minigpt4.common import dist_utils, weights
from minigpt4.common.errors import UserError, see
from minigpt4.common.files import locate

RESUME_KEY = "run.resume_ckpt_path"
BEST = "checkpoint_best.pth"
_UNFINISHED = ".tmp"


def find_resume_checkpoint(run_cfg: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from: by ``run.resume: auto`` the newest below the output folder, or a named one."""
    root, named = Path(run_cfg.get("output_dir", "output")), run_cfg.get("resume_ckpt_path")
    if run_cfg.get("resume") == "auto":
        if found := dist_utils.run_on_main(lambda: newest(root)):
            return found
        logging.info("run.resume: auto finds no checkpoint below %s: starting at the beginning.", root)
    return locate(named, RESUME_KEY) if named else None


def find_folder(run_cfg: Mapping[str, Any], job_id: str, resumed: Path | None, config: Any) -> tuple[Path, bool]:
    """The folder of a run that goes on in its own, or a new one with its configuration; and whether it is new.

    Raises:
        UserError: no folder can be made below ``run.output_dir``.
    """
    root = Path(run_cfg.get("output_dir", "output"))
    if resumed is not None and run_cfg.get("resume") == "auto" and root in resumed.parents:
        return resumed.parent, False

    def make() -> Path:
        for name in (f"{job_id}{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 1000))]):
            folder = root / name
            try:
                folder.mkdir(parents=True)
                config.save(folder / "config.yaml")
                return folder
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"run.output_dir: {folder} cannot be made or written ({error}).") from error
        raise UserError(f"run.output_dir: {root} holds 999 runs of the name {job_id}; give another folder.")

    return dist_utils.run_on_main(make), True


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


def truncate_logs(folder: Path, epoch: int, step: int) -> None:
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

"""The folder of a run and its checkpoints: written atomically, found again, pruned."""

import contextlib
import itertools
import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt4.common import dist_utils, weights
from minigpt4.common.errors import UserError, see
from minigpt4.common.files import locate
from minigpt4.common.schema import RunConfig

RESUME_KEY = "run.resume_ckpt_path"
BEST = "checkpoint_best.pth"
_PARTIAL = ".tmp"


@dataclass
class TrainState:
    """Counters of a run, stored in its checkpoints."""

    epoch: int = 0  # in progress, or next
    iteration: int = 0  # finished iterations of this epoch
    step: int = 0  # finished iterations of all epochs
    best_metric: float = -float("inf")
    num_nonfinite: int = 0  # updates skipped because of a non-finite loss
    num_nonfinite_in_a_row: int = 0


def find_resume_checkpoint(run_cfg: RunConfig) -> Path | None:
    """Returns the checkpoint to resume from: with ``run.resume: auto`` the newest one, else the one that is named."""
    root = Path(run_cfg.output_dir)
    if run_cfg.resume == "auto":
        if path := dist_utils.run_on_main(lambda: newest(root)):
            return path
        logging.info("run.resume: auto found no checkpoint below %s: starting from the beginning.", root)
    return locate(run_cfg.resume_ckpt_path, RESUME_KEY) if run_cfg.resume_ckpt_path else None


def find_folder(run_cfg: RunConfig, job_id: str, resumed: Path | None, config: Any) -> tuple[Path, bool]:
    """Returns a run's folder and whether it is new: that of the checkpoint if ``run.resume: auto`` found it.

    Raises:
        UserError: no folder can be created below ``run.output_dir``.
    """
    root = Path(run_cfg.output_dir)
    if resumed is not None and run_cfg.resume == "auto" and root in resumed.parents:
        return resumed.parent, False

    def create() -> Path:
        folder = root / job_id
        try:
            for number in itertools.count(2):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
                    config.save(folder / "config.yaml")
                    return folder
                folder = root / f"{job_id}-{number}"
        except OSError as error:
            raise UserError(f"run.output_dir: {folder} cannot be created or written ({error}).") from error

    return dist_utils.run_on_main(create), True


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint atomically: after a crash at any moment, ``path`` has its old or its new content.

    Raises:
        UserError: the disk is full or read-only; what was there before is unchanged.
    """
    partial = path.with_suffix(_PARTIAL)
    try:
        torch.save(content, partial)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)  # makes the new name durable
    except (OSError, RuntimeError) as error:  # torch's writer wraps the system's message
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = str(error.__cause__ or error).strip().split("\n")[0][:160]
        raise UserError(
            f"run.output_dir: {path} cannot be written ({cause}); earlier checkpoints are unchanged. Free some space "
            "or set run.keep_last, then resume with run.resume: auto." + see("disk-full")
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest(output_dir: Path) -> Path | None:
    """Returns the intact checkpoint with the highest step below a ``run.output_dir``, None if there is none."""
    candidates = []
    for path in (path for path in output_dir.glob("*/checkpoint_*.pth") if path.name != BEST):
        try:
            step = int(weights.read_file(path, "run.resume")["state"]["step"])
            candidates.append((step, path.stat().st_mtime_ns, path))
        except (KeyError, TypeError, ValueError) as error:
            logging.warning("Skipping %s, which is damaged or has weights only (%s).", path, error)
    for _, _, path in sorted(candidates, reverse=True):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch.load does not verify checksums
                return path
        logging.warning("Skipping a damaged checkpoint: the contents of %s do not match their checksums.", path)
    return None


def prune(folder: Path, keep_last: int | None) -> None:
    """Removes all but the last ``keep_last`` checkpoints of a folder, and never the best one."""
    if keep_last is not None:
        files = [path for path in folder.glob("checkpoint_*.pth") if path.name != BEST]
        for path in sorted(files, key=lambda file: file.stat().st_mtime_ns)[:-keep_last]:
            path.unlink(missing_ok=True)


def truncate_logs(folder: Path, epoch: int, step: int) -> None:
    """Truncates the logs of a run's folder to a checkpoint's epoch and step, and deletes partial files."""
    for path in folder.glob(f"checkpoint_*{_PARTIAL}"):
        path.unlink()
    for name, key, limit in (("metrics.jsonl", "step", step), ("log.txt", "epoch", epoch)):
        path = folder / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line).get(key, -1) < limit]
            partial = path.with_suffix(_PARTIAL)
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)

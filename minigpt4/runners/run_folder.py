"""The folder of a run: found or created, locked, and its logs."""

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate, refuse_placeholder
from minigpt4.common.schema import RunConfig
from minigpt4.runners.checkpoints import PARTIAL, PATTERN, RESUME_KEY, TrainState, newest, unwritable
from minigpt4.runners.lock import RunLock


def check_output_dir(run_cfg: RunConfig) -> None:
    """Raises UserError where ``run.output_dir`` is still a placeholder, or on rank 0 no place for a folder."""
    refuse_placeholder(run_cfg.output_dir, "run.output_dir", "the folder for checkpoints and logs")

    def check() -> None:
        root = Path(run_cfg.output_dir).absolute()
        existing = next(path for path in (root, *root.parents) if os.path.exists(path))
        if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"run.output_dir: {root} cannot be created or written (see {existing}); set another one.")

    dist_utils.run_on_main(check)


def open_folder(run_cfg: RunConfig, job_id: str, config: Any) -> tuple[Path, Path | None, RunLock | None]:
    """Returns the folder of a run, the checkpoint to resume from, if any, and, on rank 0, the lock on the folder.

    With ``run.resume: auto`` they are the newest checkpoint below ``run.output_dir`` and its folder. Otherwise, and if
    there is none, the folder is new, and the checkpoint is the one that ``run.resume_ckpt_path`` names.

    Raises:
        UserError: another process uses the folder, or none can be created.
    """
    check_output_dir(run_cfg)
    root, locks = Path(run_cfg.output_dir), []

    def claim_newest() -> Path | None:
        if found := newest(root):
            locks.append(RunLock(found.parent))
            return newest(found.parent, PATTERN) or found  # the process that had the lock may have written another
        logging.info("run.resume: auto found no checkpoint below %s: starting from the beginning.", root)
        return None

    def create() -> Path:
        folder = _create(root, job_id, config)
        locks.append(RunLock(folder))
        return folder

    resumed = dist_utils.run_on_main(claim_newest) if run_cfg.resume == "auto" else None
    if resumed is not None:
        return resumed.parent, resumed, next(iter(locks), None)
    if run_cfg.resume_ckpt_path:
        resumed = locate(run_cfg.resume_ckpt_path, RESUME_KEY)
    return dist_utils.run_on_main(create), resumed, next(iter(locks), None)


def _create(root: Path, job_id: str, config: Any) -> Path:
    folder = root / job_id
    try:
        for number in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                config.save(folder / "config.yaml")
                break
            folder = root / f"{job_id}-{number}"
    except OSError as error:
        raise UserError(f"run.output_dir: {folder} cannot be created or written ({error}).") from error
    append_line(folder / "log.txt", {"config": config.to_dict()})
    return folder


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Appends a line of JSON to a log, with null for numbers that are not finite; a UserError if the disk is full."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    line = (json.dumps(plain, default=str) + "\n").encode()
    try:
        with path.open("ab") as file:
            file.write(line)
    except OSError as error:
        raise unwritable(path, error, len(line)) from error


def truncate_logs(folder: Path, state: TrainState) -> None:
    """Truncates the logs of a run's folder to the state of a checkpoint, and deletes partial files.

    Within an epoch, and before its validation, the last step's line of metrics is kept without those of a validation.
    """
    is_validated = state.iteration == 0

    def is_past(line: dict[str, Any]) -> bool:
        return line.get("step", -1) < state.step - (not is_validated and "lr" not in line)

    try:
        for path in folder.glob(f"checkpoint_*{PARTIAL}"):
            path.unlink()
        _truncate(folder / "metrics.jsonl", is_past)
        _truncate(folder / "log.txt", lambda line: line.get("epoch", -1) < state.epoch)
    except OSError as error:
        raise unwritable(folder, error, 0) from error


def _truncate(path: Path, is_past: Callable[[dict[str, Any]], bool]) -> None:
    """Cuts a log behind its last line of the past, in place, which needs no space on the disk."""
    if not path.is_file():
        return
    end = position = 0
    for line in path.read_bytes().splitlines(keepends=True):
        position += len(line)
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # a crash may leave half a line, or zeros
            if line.endswith(b"\n") and is_past(json.loads(line)):
                end = position
    os.truncate(path, end)

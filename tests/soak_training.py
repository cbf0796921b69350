"""Soak: a training run that records its steps, and one that is killed and resumed at random moments."""

import hashlib
import io
import json
import os
import signal
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from soak_processes import Verdict

BATCH = 4
STEPS_PER_EPOCH = 20
SAVE_EVERY = 7
DAMAGED = b"\xff\xd8\xff no image"
Records = dict[Any, list[Any]]  # step or epoch -> all different entries written for it


def write_data(folder: Path) -> None:
    """Writes training shards in which every twelfth image is damaged, and one validation shard."""
    from quickstart import scenes

    scenes.write_shards(folder / "clean", num_shards=4, scenes_per_shard=60, seed=1)
    scenes.write_shards(folder / "val", num_shards=1, scenes_per_shard=12, seed=2)
    (folder / "train").mkdir()
    for shard in sorted((folder / "clean").glob("*.tar")):
        with tarfile.open(shard) as source, tarfile.open(folder / "train" / shard.name, "w") as target:
            for number, member in enumerate(source):
                content = source.extractfile(member).read()
                if member.name.endswith(".jpg") and number // 3 % 12 == 5:
                    content = DAMAGED
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))


def train_command(data: Path, output_dir: Path) -> list[str]:
    """The arguments of train.py for an endless run."""
    build_info = {"storage": f"{data}/train/*.tar", "val_storage": f"{data}/val/*.tar", "shuffle_buffer": 30}
    run = {
        "max_epoch": 100_000,  # ends by a signal
        "iters_per_epoch": STEPS_PER_EPOCH,
        "batch_size_train": BATCH,
        "num_workers": 1,
        "log_freq": 5,
        "save_every_iters": SAVE_EVERY,
        "keep_last": 2,
        "resume": "auto",
        "valid_splits": "[val]",
        "device": "cpu",
        "output_dir": output_dir,
    }
    options = [f"datasets.cc_sbu.build_info.{key}={value}" for key, value in build_info.items()]
    options += [f"run.{key}={value}" for key, value in run.items()]
    return ["--cfg-path", "train_configs/quickstart_stage1.yaml", "--options", *options]


def record_steps(path: Path) -> None:
    """Makes this process write a line for each step (loss and samples) and for each epoch (skipped samples)."""
    from minigpt4.runners import RunnerBase, report, runner_base
    from minigpt4.runners.progress import EpochProgress

    runner_base.write_report = report.write_report  # other forked runs draw none
    train_step, finish = RunnerBase.train_step, EpochProgress.finish

    def write(entry: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def step_and_write(self: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        output = train_step(self, batch, *args, **kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        texts = hashlib.sha256("\0".join(batch["text_input"]).encode()).hexdigest()[:16]
        write({"step": self.state.step, "entry": [loss.item().hex(), texts, len(batch["text_input"])]})
        return output

    def finish_and_write(self: Any) -> dict[str, float]:
        stats = finish(self)
        skipped = {name: dict(counts) for name, counts in self.skipped.items()}
        write({"step": f"epoch {self.epoch}", "entry": [skipped, stats["train_loss"]]})
        return stats

    RunnerBase.train_step, EpochProgress.finish = step_and_write, finish_and_write


def read_records(lines: Iterable[str]) -> Records:
    """Collects what ``record_steps`` wrote, over all restarts."""
    records: Records = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        if row["entry"] not in records[row["step"]]:
            records[row["step"]].append(row["entry"])
    return records


def count_steps(file: Path) -> int:
    """How many lines there are of a run, steps that were repeated counted again."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def compare_records(undisturbed: Records, restarted: Records) -> list[Verdict]:
    """Whether each step of the restarted run had the samples and the loss of the undisturbed one."""
    steps = [{key for key in records if isinstance(key, int)} for records in (undisturbed, restarted)]
    last = min(max(keys, default=-1) for keys in steps)
    wrong = [s for s in range(last + 1) if len(undisturbed[s]) != 1 or undisturbed[s] != restarted[s]]
    epochs = [key for key in undisturbed if not isinstance(key, int) and key in restarted]
    wrong_epochs = [key for key in epochs if len(undisturbed[key]) != 1 or undisturbed[key] != restarted[key]]
    num_skipped = sum(sum(counts.values()) for key in epochs for counts in undisturbed[key][0][0].values())
    return [
        Verdict(
            f"samples lost, repeated or with another loss in {last + 1} steps of both runs",
            f"{BATCH * len(wrong)} of {BATCH * (last + 1)}",
            "0, of more than 0",
            not wrong and last >= 0,
        ),
        Verdict(
            f"epochs with another mean loss or other counts of skipped samples ({num_skipped} skipped)",
            f"{len(wrong_epochs)} of {len(epochs)}",
            "0, of more than 0",
            not wrong_epochs and len(epochs) > 0 and num_skipped > 0,
        ),
    ]


class RestartedRun:
    """A run that is killed or stopped at random moments, and started again."""

    def __init__(self, command: list[str], folder: Path, rng: Random, seconds: tuple[float, float]) -> None:
        self.command, self.folder, self.rng, self.seconds = command, folder, rng, seconds
        self.records = folder / "records"
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []
        self._start()

    def _start(self) -> None:
        import forked

        self.pid = forked.start(self.command, self.folder / "log", lambda: record_steps(self.records))
        self.until = time.monotonic() + self.rng.uniform(*self.seconds)
        # Most runs save before they are ended, so that a slow machine makes progress too; others may still be starting.
        num_steps = SAVE_EVERY + 1 if self.rng.random() < 0.7 else 0
        self.until_steps = count_steps(self.records) + num_steps

    def tick(self) -> None:
        """Ends and restarts the run if its time is up."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.failures.append(f"ended by itself with status {os.waitstatus_to_exitcode(status)}")
            self._start()
        elif time.monotonic() > self.until and count_steps(self.records) >= self.until_steps:
            self.end(signal.SIGTERM if self.rng.random() < 0.3 else signal.SIGKILL)
            self._start()

    def end(self, number: int) -> None:
        """Ends the run by a signal."""
        import forked

        os.kill(self.pid, number)
        status = forked.wait(self.pid)
        self.ends[signal.Signals(number).name] += 1
        # Until a run has installed its signal handlers, SIGTERM ends it like any process.
        if status not in (0, -number):
            self.failures.append(f"status {status} after {signal.Signals(number).name}")

"""Reports of a run: console lines, a progress bar, metrics.jsonl, TensorBoard or wandb."""

import contextlib
import logging
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.logger import TRUNCATED, log_skipped
from minigpt4.common.schema import RunConfig
from minigpt4.datasets.loader import LOADER_KEY
from minigpt4.runners.run_folder import append_line

# Without a percentage and iterations per second, so that 80 columns suffice.
_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Tracker:
    """Writes numbers to metrics.jsonl and, if configured, to TensorBoard or wandb; rank 0 only.

    Raises:
        UserError: the configured tracker is not installed.
    """

    def __init__(self, run_cfg: RunConfig, folder: Path, config: dict[str, Any]) -> None:
        self._file = folder / "metrics.jsonl" if dist_utils.is_main_process() else None
        self._send = self._finish = None
        kind = "wandb" if run_cfg.wandb_log else run_cfg.tracker
        if self._file is None or kind is None:
            return
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(folder))
                self._send = lambda step, values: [writer.add_scalar(n, v, step) for n, v in values.items()]
                self._finish = writer.close
            else:
                import wandb

                run = wandb.init(dir=str(folder), config=config, name=run_cfg.job_name or folder.name)
                self._send, self._finish = lambda step, values: run.log(values, step=step), run.finish
        except ImportError as error:
            raise UserError(f"run.tracker is '{kind}', which is not installed: pip install {kind}.") from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Records named numbers at a global step."""
        if self._file is not None:
            append_line(self._file, {"step": step, **values})
        if self._send is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self._reported(lambda: self._send(step, numbers))

    def close(self) -> None:
        """Ends the tracker's run, whose threads would otherwise delay the end of the process."""
        if self._finish is not None:
            self._reported(self._finish)

    def _reported(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # the tracker's own, such as a lost connection; it must not end the training
            logging.warning("run.tracker failed (%s); the run continues with metrics.jsonl only.", error)
            self._send = self._finish = None


class EpochProgress:
    """Sums of an epoch, reported every ``log_freq`` iterations; losses stay on the device until then.

    Losses that are not finite are left out of the means; a mean of none is NaN.
    The sums can be saved, so that a resumed epoch reports the same means.
    """

    def __init__(self, device: torch.device, tracker: Tracker, log_freq: int) -> None:
        self.device = device
        self.tracker = tracker
        self.log_freq = log_freq
        self._num_sources = 1
        self._clear()

    def _clear(self) -> None:
        self.skipped: dict[str, Counter] = {}  # samples by data set and kind
        # Sum and number of the finite losses, of the epoch and since the last report.
        self._losses, self._window_losses = torch.zeros(2, 2, device=self.device)
        # By source: the same two numbers of the epoch, and the same since the last report.
        self._source_losses: dict[str, torch.Tensor] = {}
        self._lr_sum = 0.0
        self._window: Counter = Counter()  # since the last report

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of this rank as plain numbers."""
        return {
            "loss_sum": self._losses[0].item(),
            "num_losses": self._losses[1].item(),
            "window_loss": self._window_losses[0].item(),
            "num_window_losses": self._window_losses[1].item(),
            "window_iters": self._window["iters"],
            "source_losses": {name: sums.tolist() for name, sums in self._source_losses.items()},
            "lr_sum": self._lr_sum,
            "skipped": {name: dict(counts) for name, counts in self.skipped.items()},
        }

    def load_state_dict(self, ranks: Sequence[Mapping[str, Any]], iteration: int) -> None:
        """Restores the sums of all ranks at an iteration; with another number of ranks, each takes their mean."""
        self._clear()
        rank, is_same = dist_utils.get_rank(), len(ranks) == dist_utils.get_world_size()
        mine = ranks[rank : rank + 1] if is_same else ranks
        for saved in mine:  # earlier versions counted losses that were not finite as 0
            epoch = saved["loss_sum"], saved.get("num_losses", iteration)
            window = saved["window_loss"], saved.get("num_window_losses", saved["window_iters"])
            self._losses += torch.tensor(epoch, device=self.device) / len(mine)
            self._window_losses += torch.tensor(window, device=self.device) / len(mine)
            for name, sums in saved.get("source_losses", {}).items():
                self._sums_of(name).add_(torch.tensor(sums, device=self.device) / len(mine))
        self._window["iters"] = mine[0]["window_iters"]
        self._lr_sum = mine[0]["lr_sum"]
        if is_same or rank == 0:
            self.skipped = _add_counts(saved["skipped"] for saved in mine)

    @contextlib.contextmanager
    def run_epoch(self, epoch: int, num_iters: int, first: int = 0) -> Iterator[None]:
        """Context of an epoch, with a progress bar; at iteration ``first`` it continues with the restored sums."""
        if first == 0:
            self._clear()
        self.epoch, self.num_iters, self._first = epoch, num_iters, first
        self._start = self._window_start = time.perf_counter()
        is_hidden = not (dist_utils.is_main_process() and sys.stderr.isatty())
        settings = {"desc": f"epoch {epoch}", "disable": is_hidden, "leave": False, "bar_format": _BAR}
        settings["ncols"], settings["nrows"] = shutil.get_terminal_size()  # 80, 24 without a size, as in containers
        with logging_redirect_tqdm(), tqdm(total=num_iters, initial=first, **settings) as self._bar:
            yield

    def add(
        self,
        i: int,
        step: int,
        loss: torch.Tensor,
        counts: Mapping[str, int],
        batch: Mapping[str, Any],
        lr: float,
        data_time: float,
    ) -> bool:
        """Adds iteration ``i`` of the epoch, ``step`` of the run, whose batch took ``data_time`` seconds to arrive.

        ``loss`` is on the device; ``counts`` has ``num_tokens``, ``num_padded_tokens`` (with padding) and
        ``num_truncated`` (conversations without their end), as far as they are known.

        Returns:
            Whether a report was made, which synchronises with the device.
        """
        is_finite = loss.isfinite()
        finite = torch.stack([torch.where(is_finite, loss, 0.0), is_finite.to(loss.dtype)])
        self._losses += finite
        self._window_losses += finite
        self._lr_sum += lr
        world = dist_utils.get_world_size()
        self._window.update(
            iters=1,
            timed=1,  # by this process; iterations before a resume have no time
            images=_num_rows(batch) * world,
            tokens=counts.get("num_tokens", 0) * world,
            padded_tokens=counts.get("num_padded_tokens", 0) * world,
            data_time=data_time,
        )
        info = batch.get(LOADER_KEY) or {"source": "data", "skipped": {}}
        self._num_sources = info.get("num_sources", 1)
        self._sums_of(info["source"]).add_(finite)
        truncated = {TRUNCATED: n} if (n := counts.get("num_truncated", 0)) else {}
        self.skipped.setdefault(info["source"], Counter()).update(info["skipped"] | truncated)
        self._bar.update()
        is_reported = i % self.log_freq == 0 or i + 1 == self.num_iters
        if is_reported:
            self._report(i, step, lr)
        return is_reported

    def _sums_of(self, source: str) -> torch.Tensor:
        return self._source_losses.setdefault(source, torch.zeros(2, 2, device=self.device))

    def _means_by_source(self, prefix: str, window: int) -> dict[str, float]:
        """The mean losses of the epoch (0) or since the last report (1), where there are several sources."""
        if max(self._num_sources, len(self._source_losses)) < 2:
            return {}
        # Each batch is of one source, the same on all ranks; so they have the same names here.
        means = {f"{prefix}{name}": _mean(sums[window]) for name, sums in sorted(self._source_losses.items())}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}

    def _report(self, i: int, step: int, lr: float) -> None:
        loss = _mean(self._window_losses)
        now = time.perf_counter()
        seconds, window = max(now - self._window_start, 1e-9), self._window
        values = {
            "epoch": self.epoch,
            "lr": lr,
            "loss": loss,
            **self._means_by_source("loss/", 1),
            "time": seconds / window["timed"],
            "data": window["data_time"] / window["timed"],
            "images/s": window["images"] / seconds,
            "tokens/s": window["tokens"] / seconds,
            "padded tokens/s": window["padded_tokens"] / seconds,
            "max mem": devices.max_memory_mib(self.device),
        }
        eta = timedelta(seconds=int((now - self._start) / (i + 1 - self._first) * (self.num_iters - i - 1)))
        share = 100 * window["data_time"] / seconds
        logging.info(
            "Train: data epoch: [%(epoch)d]  [%(i)d/%(num_iters)d]  eta: %(eta)s  lr: %(lr).6g  loss: %(loss).4f  "
            "time: %(time).4f  data: %(data).4f (%(share).0f %%)  images/s: %(images/s).1f  tokens/s: %(tokens/s).0f "
            "(padded %(padded tokens/s).0f)  max mem: %(max mem).0f MB",
            values | {"i": i, "num_iters": self.num_iters, "eta": eta, "share": share},
        )
        self._bar.set_postfix({"loss": f"{loss:.4f}", "lr": f"{lr:.3g}", "images/s": f"{values['images/s']:.1f}"})
        self.tracker.log(step, values)
        self._window_losses.zero_()
        for sums in self._source_losses.values():
            sums[1].zero_()
        self._window.clear()
        self._window_start = now

    def finish(self) -> dict[str, float]:
        """Ends the epoch, logs the skipped samples of all ranks, and returns the means of loss and learning rate."""
        self.skipped = _add_counts(dist_utils.gather_objects(self.skipped))
        for name, counts in self.skipped.items():
            log_skipped(counts, name)
        mean, by_source = _mean(self._losses), self._means_by_source("train_loss_", 0)
        seconds = time.perf_counter() - self._start
        per_iteration = seconds / max(1, self.num_iters - self._first)
        total = timedelta(seconds=int(seconds))
        logging.info("Train: data epoch: [%d] Total time: %s (%.4f s / it)", self.epoch, total, per_iteration)
        return {"train_lr": self._lr_sum / self.num_iters, "train_loss": mean, **by_source}


def _mean(losses: torch.Tensor) -> float:
    """The mean over all ranks from a rank's sum and number."""
    total, number = dist_utils.all_reduce_sum(losses.clone()).tolist()
    return total / number if number else float("nan")


def _add_counts(parts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, Counter]:
    total: dict[str, Counter] = {}
    for part in parts:
        for name, counts in part.items():
            total.setdefault(name, Counter()).update(counts)
    return total


def _num_rows(batch: Mapping[str, Any]) -> int:
    sized = (value for value in batch.values() if isinstance(value, list) or (torch.is_tensor(value) and value.ndim))
    return len(next(sized, ()))

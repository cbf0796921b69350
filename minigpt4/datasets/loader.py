"""Loaders: training batches mixed from several data sets, and evaluation batches. All order follows from the seed.

A checkpoint stores how far each data set was read. A resumed run, and a new loader that starts at a later epoch,
continue with exactly the batches of a run that was never interrupted.
"""

import atexit
import copy
import functools
import logging
import math
import mmap
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.logger import log_skipped
from minigpt4.datasets.batches import (
    LoadedBatch,
    MapBatches,
    Place,
    StreamBatches,
    check_kind,
    is_map_style,
    repeat_iterable,
    training_places,
)
from minigpt4.datasets.datasets.sample import StreamPosition, WorkerInfo, derive_seed

# A batch is what its data set's collater returns; of the built-in data sets: image float32 [B, 3, S, S], or features
# bfloat16 [B, Q, H] instead, text_input and instruction, lists of length B.
Batch = dict[str, Any]
# In a training batch: {"source": name of the data set, "num_sources": of the run, "skipped": counts by kind}.
LOADER_KEY = "loader"


@functools.cache
def _exit_flag(pid: int) -> mmap.mmap:
    """Whether a rank is exiting: a byte that it shares with its forked workers."""
    flag = mmap.mmap(-1, 1)

    def mark() -> None:  # before multiprocessing terminates the workers, and waits for them
        if os.getpid() == pid:  # and not that of a fork
            flag[0] = 1

    atexit.register(mark)
    return flag


def _init_worker(rank_pid: int, _: int) -> None:
    """Ties a worker's life to its rank's (on Linux)."""
    is_exiting = _exit_flag(rank_pid)
    folder = multiprocessing.util.get_temp_dir()  # created now: an ending worker could not remove a later one

    def on_sigterm(*_: Any) -> None:
        # A scheduler sends SIGTERM to all processes, but the rank still finishes its step and saves a checkpoint.
        if is_exiting[0] or os.getppid() != rank_pid:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

    for number in set(dist_utils.STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, on_sigterm)
        dist_utils.end_with_parent(signal.SIGTERM)
        on_sigterm()  # if the rank died before that call


def _load(
    name: str, batches: Dataset, places: Iterable[list[Place]] | None, num_workers: int, pin_memory: bool, seed: int
) -> Iterator[LoadedBatch]:
    _exit_flag(os.getpid())  # made before workers are forked
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=places,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_init_worker, os.getpid()),
        # Workers have to be children of this process, and not of a fork server.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(seed),  # its own: a resumed loader must not advance the model's
    )
    try:
        for loaded in loader:
            if loaded.error is not None:
                raise loaded.error
            yield loaded
    except UserError:
        raise
    except Exception as error:  # batches carry the exceptions of data sets, so a worker has died
        advice = "If a worker was killed for lack of memory, lower run.num_workers or build_info.shuffle_buffer."
        raise UserError(f"The loader of data set {name} failed ({str(error)[:200]}). {advice}") from error


# What goes to workers has to be picklable, as macOS spawns them: functions of this module, and no closures.


def _unchanged(loaded: LoadedBatch) -> LoadedBatch:
    return loaded


def _resume(
    dataset: Any, positions: Mapping[int, Any], shuffle_key: int | str, worker: WorkerInfo, skipped: Counter
) -> Iterator[Any]:
    position = StreamPosition(**positions.get(worker.worker_id, {}))
    return dataset.iter_train(worker, shuffle_key, position, skipped)


def _iterate(dataset: Any, *_: Any) -> Iterator[Any]:
    return iter(dataset)


def _rank_info(seed: int) -> WorkerInfo:
    return WorkerInfo(seed, dist_utils.get_rank(), dist_utils.get_world_size())


@dataclass(eq=False)
class TrainLoader:
    """Training batches of several data sets: one data set per batch, drawn by ``sample_ratio``, alike on every rank.

    Map-style data sets are shuffled anew in each pass. Samples at its end that do not fill a batch on every rank are
    dropped, unless the data set has ``drop_last = False`` or is smaller than that: then batches extend into the next
    pass, and the sequence of samples depends neither on the number of ranks nor on the batch size.

    Args:
        datasets: by name, each of a kind that ``batches`` lists.
        ratios: their weights; 1 where a weight is None, the number of samples where it is "size".
        batch_size: samples per rank and batch; a number for all data sets or one for each, by name.
        num_workers: loader processes per data set; fewer for a map-style one that gives a small share of the batches.
        seed: of order, draws and augmentation.

    Raises:
        UserError: there is no data set, one is of no known kind, or the weights are unusable.
    """

    datasets: Mapping[str, Any]
    ratios: Mapping[str, float | str | None]
    batch_size: int | Mapping[str, int]
    iters_per_epoch: int
    num_workers: int
    seed: int
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if not self.datasets:
            raise UserError("No data set has a split to train on; see run.train_splits and the datasets section.")
        self.weights = [self._weight(name) for name in self.datasets]
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(f"sample_ratio of {', '.join(self.datasets)} are {self.weights}; expected numbers above 0.")
        for name, dataset in self.datasets.items():
            check_kind(name, dataset)
        self._num_samples: dict[str, int] = {}  # of map-style data sets: used by all ranks since the run began
        self._positions: dict[str, dict[int, Any]] = {}  # of streams: by data set and worker
        self._shuffle_key: int | str = 0  # of streams: the epoch, or the step of a resume
        self._iterables: dict[str, Iterator[LoadedBatch]] = {}  # they keep running from epoch to epoch

    def _weight(self, name: str) -> float:
        ratio, dataset = self.ratios.get(name), self.datasets[name]
        if ratio == "size" and not hasattr(dataset, "__len__"):
            advice = "set sample_ratio to a number in proportion to the others"
            raise UserError(f"datasets.{name}.sample_ratio is size, but shards have no known number; {advice}.")
        return float(len(dataset)) if ratio == "size" else 1.0 if ratio is None else float(ratio)

    def _source_of(self, step: int) -> str:
        # A str seed gives the same draws on every platform and in every process.
        return random.Random(f"{self.seed}:{step}").choices(list(self.datasets), self.weights)[0]

    def _batch_size(self, name: str) -> int:
        return self.batch_size[name] if isinstance(self.batch_size, Mapping) else self.batch_size

    def _step_size(self, name: str) -> int:
        return self._batch_size(name) * dist_utils.get_world_size()

    def _pass_size(self, name: str) -> int:
        size, step = len(self.datasets[name]), self._step_size(name)
        return size // step * step if getattr(self.datasets[name], "drop_last", True) and step <= size else size

    def iter_epoch(
        self, epoch: int, first: int = 0, draw: Callable[[Iterator[LoadedBatch]], LoadedBatch] = next
    ) -> Iterator[Batch]:
        """The batches of one epoch from iteration ``first`` on, each with a ``LOADER_KEY``.

        Data are waited for in ``draw``. If that raises, the batch does not count as read.

        Raises:
            UserError: a data set fails, or has no usable sample.
        """
        start = epoch * self.iters_per_epoch
        order = [self._source_of(step) for step in range(start, start + self.iters_per_epoch)]
        if first == 0:
            self._shuffle_key, self._positions = epoch, {}
        sources = {
            name: self._open(name, num_batches, start + first, order[:first].count(name))
            for name, num_batches in Counter(order[first:]).items()
        }
        for name in order[first:]:
            loaded = draw(sources[name])
            if name in self._num_samples:
                self._num_samples[name] += self._step_size(name)
            if loaded.position is not None:
                self._positions.setdefault(name, {})[loaded.worker_id] = loaded.position
            info = {"source": name, "num_sources": len(self.datasets), "skipped": loaded.skipped}
            yield {**loaded.batch, LOADER_KEY: info}

    def _open(self, name: str, num_batches: int, step: int, num_done: int) -> Iterator[LoadedBatch]:
        """Starts the loader of a data set for ``num_batches`` batches at a step, ``num_done`` into the epoch."""
        dataset, worker, batch_size = self.datasets[name], _rank_info(self.seed), self._batch_size(name)
        settings = self.num_workers, self.pin_memory, derive_seed(self.seed, name, "workers", worker.rank)
        if is_map_style(dataset):
            # Twice its share of all workers, as draws come in bursts: 20 data sets do not need 20 times as many.
            share = self.weights[list(self.datasets).index(name)] / sum(self.weights)
            settings = min(self.num_workers, math.ceil(2 * self.num_workers * share)), *settings[1:]
            step_size, pass_size = self._step_size(name), self._pass_size(name)
            if name not in self._num_samples:  # a fresh loader, perhaps at a later epoch
                self._num_samples[name] = sum(self._source_of(i) == name for i in range(step)) * step_size
            start = self._num_samples[name] + worker.rank * batch_size
            starts = range(start, start + num_batches * step_size, step_size)
            places = training_places(name, len(dataset), pass_size, self.seed, starts, batch_size)
            return _load(name, MapBatches(name, dataset, self.seed, is_train=True), places, *settings)
        if hasattr(dataset, "iter_train"):
            resume = functools.partial(_resume, dataset, self._positions.get(name, {}), self._shuffle_key)
            first_worker = num_done % max(1, self.num_workers)
            batches = StreamBatches(name, dataset, resume, worker, batch_size, num_batches, first_worker)
            return _load(name, batches, None, *settings)
        if name not in self._iterables:
            worker = WorkerInfo(derive_seed(self.seed, "step", step), worker.rank, worker.world_size)
            batches = StreamBatches(
                name, dataset, functools.partial(repeat_iterable, name, dataset), worker, batch_size
            )
            self._iterables[name] = _load(name, batches, None, *settings)
        return self._iterables[name]

    def state_dict(self) -> dict[str, Any]:
        """This rank's positions behind the last batch, as plain containers."""
        return {
            "passes": {name: divmod(number, self._pass_size(name)) for name, number in self._num_samples.items()},
            "positions": copy.deepcopy(self._positions),
            "shuffle_key": self._shuffle_key,
            "layout": self._layout(),
        }

    def _layout(self) -> list[Any]:
        batch_size = dict(self.batch_size) if isinstance(self.batch_size, Mapping) else self.batch_size
        return [dist_utils.get_world_size(), self.num_workers, batch_size]

    def load_state_dict(self, ranks: Sequence[Mapping[str, Any]], epoch: int, first: int) -> None:
        """Resumes before iteration ``first`` of ``epoch``, from the ``state_dict`` of every rank.

        If the run had another number of ranks, workers or samples per batch, map-style data sets continue after the
        samples already used, and streams of shards start anew with other draws than at the start of the epoch.
        """
        is_same = ranks[0]["layout"] == self._layout()
        state = ranks[dist_utils.get_rank() if is_same else 0]
        self._num_samples = {
            name: pass_index * self._pass_size(name) + min(offset, self._pass_size(name))
            for name, (pass_index, offset) in state["passes"].items()
            if is_map_style(self.datasets.get(name))
        }
        self._positions = copy.deepcopy(state["positions"]) if is_same else {}
        self._shuffle_key = state["shuffle_key"] if is_same else f"{epoch}, from {first} on"
        for name, dataset in self.datasets.items():
            if not is_map_style(dataset) and not hasattr(dataset, "iter_train"):
                logging.warning("Data set %s is an iterable, whose position is unknown: it begins anew.", name)
        if not is_same:
            logging.warning(
                "The checkpoint was written by %d ranks with %d loader workers and batches of %s, this run has %d, %d "
                "and %s: map-style data sets continue where they were, shards are drawn anew from here on.",
                *ranks[0]["layout"],
                *self._layout(),
            )


@dataclass(eq=False)
class EvalLoader:
    """See ``eval_batches``. ``skipped`` counts the unusable samples of an iteration; only streams have no length."""

    name: str
    dataset: Any
    batch_size: int
    num_workers: int
    worker: WorkerInfo
    pin_memory: bool = False
    skipped: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        check_kind(self.name, self.dataset)

    def _places(self) -> list[list[Place]]:
        places = [("eval", i, i) for i in range(self.worker.rank, len(self.dataset), self.worker.world_size)]
        return [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]

    def __len__(self) -> int:
        if not is_map_style(self.dataset):
            raise TypeError(f"{self.name} is a stream: its number of batches is unknown")
        return len(self._places())

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = Counter()
        if is_map_style(self.dataset):
            batches: Dataset = MapBatches(self.name, self.dataset, self.worker.seed, is_train=False)
            places: list[list[Place]] | None = self._places()
        else:
            open_stream = getattr(self.dataset, "iter_eval", functools.partial(_iterate, self.dataset))
            batches, places = StreamBatches(self.name, self.dataset, open_stream, self.worker, self.batch_size), None
        for loaded in _load(self.name, batches, places, self.num_workers, self.pin_memory, self.worker.seed):
            self.skipped.update(loaded.skipped)
            if loaded.batch is not None:
                yield loaded.batch
        log_skipped(self.skipped, self.name)


def eval_batches(
    name: str,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool = False,
    is_whole: bool = False,
) -> EvalLoader:
    """Batches of every sample once, divided over the ranks, or all of them on each rank (``is_whole``).

    They can be iterated several times.
    """
    worker = WorkerInfo(seed) if is_whole else _rank_info(seed)
    return EvalLoader(name, dataset, batch_size, num_workers, worker, pin_memory)

"""Loaders: training batches mixed from several data sets, and evaluation batches. All order follows from the seed.

A checkpoint stores how far each data set was read. A resumed run, and a new loader that starts at a later epoch,
continue with exactly the batches of a run that was never interrupted.
"""

import atexit
import copy
import ctypes
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.logger import log_skipped
from minigpt4.datasets.batches import (
    EvalSampler,
    LoadedBatch,
    MapBatches,
    PassSampler,
    StreamBatches,
    check_kind,
    is_map_style,
    repeat_iterable,
)
from minigpt4.datasets.datasets.sample import StreamPosition, WorkerInfo, derive_seed

# A batch is what its data set's collater returns; of the built-in data sets: image float32 [B, 3, S, S], or features
# bfloat16 [B, Q, H] instead, text_input and instruction, lists of length B.
Batch = dict[str, Any]
LOADER_KEY = "loader"  # in a training batch: {"source": name of the data set, "skipped": counts by kind}
_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies


def _init_worker(rank_pid: int, is_closed: Any, _: int) -> None:
    """Ties a worker's life to its rank's, and to nothing else."""
    folder = multiprocessing.util.get_temp_dir()  # created now: an ending worker could not remove a later one

    def on_sigterm(*_: Any) -> None:
        # Without this condition, a scheduler that sends SIGTERM to all processes would end the workers while the rank
        # finishes its step and saves a checkpoint.
        if is_closed.value or os.getppid() != rank_pid:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    on_sigterm()  # if the rank died before that call


_running: weakref.WeakSet[Iterator[LoadedBatch]] = weakref.WeakSet()


@atexit.register
def _close_loaders() -> None:
    """Ends the workers of loaders that an exception keeps alive; Python would wait for them for ever."""
    for batches in list(_running):
        batches.close()


def _load(
    name: str, batches: Dataset, sampler: Sampler | None, num_workers: int, pin_memory: bool, seed: int
) -> Iterator[LoadedBatch]:
    running = _run_loader(name, batches, sampler, num_workers, pin_memory, seed)
    _running.add(running)
    return running


def _run_loader(
    name: str, batches: Dataset, sampler: Sampler | None, num_workers: int, pin_memory: bool, seed: int
) -> Iterator[LoadedBatch]:
    is_closed = multiprocessing.RawValue("b", 0)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=partial(_init_worker, os.getpid(), is_closed),
        # Workers have to be children of this process, and not of a fork server.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(seed),  # its own: a resumed loader must not advance the model's
    )
    failure = ""
    try:
        for loaded in loader:
            if loaded.error is not None:
                raise loaded.error
            yield loaded
    except UserError:
        raise
    except Exception as error:  # batches carry the exceptions of data sets, so a worker has died
        failure = " ".join(str(error).split())[:200]
    finally:
        is_closed.value = 1
    if failure:  # raised here, where its traceback does not keep the loader and its other workers alive
        raise UserError(
            f"The loader of data set {name} failed ({failure}). If a worker was killed for lack of memory, lower "
            "run.num_workers or build_info.shuffle_buffer."
        )


def _unchanged(value: Any) -> Any:
    return value


class TrainLoader:
    """Training batches of several data sets: one data set per batch, drawn by ``sample_ratio``, alike on every rank.

    Args:
        datasets: by name; each is map-style, a resumable stream or an iterable, see ``batches``.
        ratios: their weights; 1 where a weight is None.
        batch_size: samples per rank and batch; a number for all data sets or one for each, by name.
        iters_per_epoch: batches per epoch.
        num_workers: loader processes per data set.
        seed: of order, draws and augmentation.
        pin_memory: for faster copies to an accelerator.

    Raises:
        UserError: there is no data set, one is of no known kind, or the weights are unusable.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        ratios: Mapping[str, float | None],
        batch_size: int | Mapping[str, int],
        iters_per_epoch: int,
        num_workers: int,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        if not datasets:
            raise UserError("No data set has a split to train on; see run.train_splits and the datasets section.")
        self.datasets = dict(datasets)
        self.weights = [1.0 if ratios.get(name) is None else float(ratios[name]) for name in self.datasets]
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(f"sample_ratio of {', '.join(self.datasets)} are {self.weights}; expected numbers above 0.")
        for name, dataset in self.datasets.items():
            check_kind(name, dataset)
        self.batch_size = batch_size
        self.iters_per_epoch = iters_per_epoch
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self._shuffle_key: int | str = 0  # of the streams: the epoch, or the step of a resume
        self._positions: dict[str, dict[int, Any]] = {}  # by data set and worker; missing ones follow from the step
        self._iterables: dict[str, Iterator[LoadedBatch]] = {}  # they keep running from epoch to epoch

    def _source_of(self, step: int) -> str:
        # A str seed gives the same draws on every platform and in every process.
        return random.Random(f"{self.seed}:{step}").choices(list(self.datasets), self.weights)[0]

    def iter_epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from iteration ``first`` on, each with a ``LOADER_KEY``.

        Raises:
            UserError: a data set fails, or has no usable sample.
        """
        start = epoch * self.iters_per_epoch
        order = [self._source_of(step) for step in range(start, start + self.iters_per_epoch)]
        if first == 0:
            self._shuffle_key = epoch
            self._positions = {name: p for name, p in self._positions.items() if is_map_style(self.datasets[name])}
        sources = {
            name: self._open(name, num_batches, start + first, order[:first].count(name))
            for name, num_batches in Counter(order[first:]).items()
        }
        for name in order[first:]:
            loaded = next(sources[name])
            if loaded.position is not None:
                self._positions.setdefault(name, {})[loaded.worker_id] = loaded.position
            yield {**loaded.batch, LOADER_KEY: {"source": name, "skipped": loaded.skipped}}

    def _open(self, name: str, num_batches: int, step: int, num_done: int) -> Iterator[LoadedBatch]:
        """Starts the loader of a data set for ``num_batches`` batches at a step, ``num_done`` into the epoch."""
        dataset, worker, sampler = self.datasets[name], _rank_info(self.seed), None
        batch_size = self.batch_size[name] if isinstance(self.batch_size, Mapping) else self.batch_size
        positions, shuffle_key = self._positions.get(name, {}), self._shuffle_key

        def resume(worker: WorkerInfo, skipped: Counter) -> Iterator[Any]:
            position = StreamPosition(**positions.get(worker.worker_id, {}))
            return dataset.iter_train(worker, shuffle_key, position, skipped)

        if is_map_style(dataset):
            drop_last = getattr(dataset, "drop_last", True)
            sampler = PassSampler(name, len(dataset), worker, batch_size, num_batches, drop_last)
            earlier = sum(self._source_of(before) == name for before in range(0 if positions else step))
            sampler.position = positions.get(0) or sampler.position_after(earlier)
            batches: Any = MapBatches(name, dataset, self.seed, is_train=True)
        elif hasattr(dataset, "iter_train"):
            first_worker = num_done % max(1, self.num_workers)
            batches = StreamBatches(name, dataset, resume, worker, batch_size, num_batches, first_worker)
        elif name in self._iterables:
            return self._iterables[name]
        else:
            worker = WorkerInfo(derive_seed(self.seed, "step", step), worker.rank, worker.world_size)
            batches = StreamBatches(
                name, dataset, lambda worker, _: repeat_iterable(name, dataset, worker), worker, batch_size
            )
        seed = derive_seed(worker.seed, name, "workers", worker.rank)
        loaded = _load(name, batches, sampler, self.num_workers, self.pin_memory, seed)
        if sampler is None and not hasattr(dataset, "iter_train"):
            self._iterables[name] = loaded
        return loaded

    def state_dict(self) -> dict[str, Any]:
        """This rank's positions behind the last batch, as plain containers."""
        return {
            "shuffle_key": self._shuffle_key,
            "positions": copy.deepcopy(self._positions),
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
        self._shuffle_key = state["shuffle_key"] if is_same else f"{epoch}, from {first} on"
        self._positions = {}
        for name, dataset in self.datasets.items():
            # A data set may be of another kind now, as with a feature cache: its position then follows from the step.
            key = "offset" if is_map_style(dataset) else "num_samples"
            saved = state["positions"].get(name, {}) if is_same or is_map_style(dataset) else {}
            self._positions[name] = {worker_id: position for worker_id, position in saved.items() if key in position}
            if not is_map_style(dataset) and not hasattr(dataset, "iter_train"):
                logging.warning("Data set %s is an iterable, whose position is unknown: it begins anew.", name)
        if not is_same:
            logging.warning(
                "The checkpoint was written by %d ranks with %d loader workers and batches of %s, this run has %d, %d "
                "and %s: map-style data sets continue where they were, shards are drawn anew from here on.",
                *(*ranks[0]["layout"], *self._layout()),
            )


def _rank_info(seed: int) -> WorkerInfo:
    return WorkerInfo(seed, dist_utils.get_rank(), dist_utils.get_world_size())


class EvalLoader:
    """The batches of a data set, every sample once; see ``eval_batches``. Can be iterated several times.

    ``skipped`` counts the unusable samples of an iteration by kind. The length is known for map-style data sets.
    """

    def __init__(
        self, name: str, dataset: Any, batch_size: int, num_workers: int, worker: WorkerInfo, pin_memory: bool
    ) -> None:
        check_kind(name, dataset)
        self.name = name
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.skipped: Counter = Counter()
        self._seed = worker.seed
        if is_map_style(dataset):
            self._sampler: EvalSampler | None = EvalSampler(len(dataset), worker, batch_size)
            self._batches: Any = MapBatches(name, dataset, worker.seed, is_train=False)
        else:
            open_stream = getattr(dataset, "iter_eval", lambda *_: iter(dataset))
            self._sampler = None
            self._batches = StreamBatches(name, dataset, open_stream, worker, batch_size)

    def __len__(self) -> int:
        if self._sampler is None:
            raise TypeError(f"{self.name} is a stream: its number of batches is unknown")
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = Counter()
        for loaded in _load(self.name, self._batches, self._sampler, self.num_workers, self.pin_memory, self._seed):
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
    """Every sample of a data set once, divided over the ranks, or all of them on each rank (``is_whole``)."""
    worker = WorkerInfo(seed) if is_whole else _rank_info(seed)
    return EvalLoader(name, dataset, batch_size, num_workers, worker, pin_memory)

"""Batches for training, mixed from several sources, and for validation. What a run sees follows from its seed."""

import atexit
import logging
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.sample import Place, Sample

# image [B, 3, S, S], or features [B, Q, H]; text_input, instruction: B each; source: name; position: (worker,
# of its stream); skipped: counts
Batch = dict[str, Any]


class _Batches(IterableDataset):
    """One source's batches, made in loader workers: batch k of an epoch comes from worker k modulo their number."""

    def __init__(self, name: str, dataset: Any, place: Place, num_batches: int | None) -> None:
        self.name = name
        self.dataset = dataset
        self.place = place
        self.num_batches = num_batches  # None: every sample once

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        place = replace(
            self.place,
            turn=worker.id if worker else 0,
            num_workers=worker.num_workers if worker else 1,
            skipped=Counter(),
        )
        try:
            if self.num_batches is None:
                yield from self._validation(place)
            else:
                samples = self.dataset.endless(place)
                for _ in range(place.turn, self.num_batches, place.num_workers):
                    yield self._collate([next(samples) for _ in range(place.batch_size)], place)
        except UserError as error:  # raised in a worker it would arrive wrapped in a traceback
            yield error

    def _validation(self, place: Place) -> Iterator[Batch]:
        rows: list[Sample] = []
        for sample in self.dataset.once(place):
            rows.append(sample)
            if len(rows) == place.batch_size:
                yield self._collate(rows, place)
                rows = []
        if rows:
            yield self._collate(rows, place)

    def _collate(self, rows: list[Sample], place: Place) -> Batch:
        skipped, place.skipped = place.skipped, Counter()
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        for name in batch.keys() & {"image", "features"}:
            batch[name] = default_collate(batch[name])  # in a worker, into the memory that it shares
        return batch | {
            "source": self.name,
            "position": (place.worker, place.position),
            "skipped": dict(skipped),  # a Counter would be doubled: the loader copies mappings with update()
        }


def _begin_worker(rank: int, _: int) -> None:
    """Lets a worker finish its batches while its rank, signalled along with it, finishes its step.

    Args:
        rank: the process that the worker belongs to, whose end is the worker's too.
    """
    # Made now and not when the first batch is handed over: a worker that is ending then would not remove it.
    folder = multiprocessing.util.get_temp_dir()
    threading.Thread(target=_end_with, args=(rank, folder), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The loader ends stuck workers by SIGTERM; the first one may have come from a scheduler.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _end_with(rank: int, folder: str) -> None:
    """Ends a worker whose rank was killed, whatever it does then.

    PyTorch's own watch misses a rank that is killed before it begins, and a worker that waits for room in a pipe which
    nobody reads any more.
    """
    while os.getppid() == rank:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


_running: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Lets go of what an exception has left running: Python would send its workers one SIGTERM and wait for ever."""
    for batches in list(_running):
        batches.close()


def _loader(batches: _Batches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    running = _run_loader(batches, num_workers, pin_memory)
    _running.add(running)
    return running


def _run_loader(batches: _Batches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=partial(_begin_worker, os.getpid()),
        # A child of this process, not of a server of forks.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # of its own: a loader begun anew must not move the model's random state
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class TrainLoader:
    """Batches of several sources, one source a batch, drawn by ``sample_ratio``; the same source on every rank.

    Args:
        sources: data sets by name.
        ratios: their weights; equal where a weight is None.
        batch_size: samples a rank and batch.
        iters_per_epoch: batches an epoch.
        num_workers: loader processes a source.
        seed: of order, draws and augmentation.
        pin_memory: for copies to an accelerator.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        ratios: Mapping[str, float | None],
        batch_size: int,
        iters_per_epoch: int,
        num_workers: int,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        if not sources:
            raise UserError("No data set has a split to train on; see run.train_splits and the datasets section.")
        self.sources = dict(sources)
        self.weights = [1.0 if ratios.get(name) is None else float(ratios[name]) for name in self.sources]
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(f"sample_ratio of {', '.join(self.sources)} are {self.weights}; expected numbers above 0.")
        self.batch_size = batch_size
        self.iters_per_epoch = iters_per_epoch
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self._given: Counter | None = None  # samples by source to all ranks together; None: follows from the count
        self._draw: int | str = 0
        self._positions: dict[str, dict[int, Any]] = {}

    def _source_of(self, step: int) -> str:
        # str seeds hash alike on every platform and process
        return random.Random(f"{self.seed}:{step}").choices(list(self.sources), self.weights)[0]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from iteration ``first`` on, without those before it."""
        start = epoch * self.iters_per_epoch
        order = [self._source_of(step) for step in range(start, start + self.iters_per_epoch)]
        if self._given is None:
            before = Counter(map(self._source_of, range(start))) + Counter(order[:first])
            self._given = Counter({name: count * self._samples_a_batch for name, count in before.items()})
        if first == 0:
            self._draw, self._positions = epoch, {}
        done, streams = Counter(order[:first]), {}
        for name, num_batches in Counter(order[first:]).items():
            place = Place(
                seed=self.seed,
                rank=dist_utils.get_rank(),
                world_size=dist_utils.get_world_size(),
                batch_size=self.batch_size,
                first_sample=self._given[name],
                first_batch=done[name],
                draw=self._draw,
                positions=self._positions.get(name, {}),
            )
            batches = _Batches(name, self.sources[name], place, num_batches)
            streams[name] = _loader(batches, self.num_workers, self.pin_memory)
        for name in order[first:]:
            batch = next(streams[name])
            self._given[name] += self._samples_a_batch
            worker, position = batch["position"]
            if position is not None:
                self._positions.setdefault(name, {})[worker] = position
            yield batch

    @property
    def _samples_a_batch(self) -> int:
        return self.batch_size * dist_utils.get_world_size()

    def state_dict(self) -> dict[str, Any]:
        """This rank's place in the data, behind the batch that came last; plain containers."""
        return {
            "given": dict(self._given or {}),
            "draw": self._draw,
            "positions": self._positions,
            "shape": [dist_utils.get_world_size(), self.num_workers, self.batch_size],
        }

    def load_state_dict(self, ranks: Sequence[Mapping[str, Any]], epoch: int, first: int) -> None:
        """Goes on where the ranks of a run left the data before iteration ``first`` of ``epoch``.

        With another number of ranks, workers or rows a batch, listed pairs go on behind the last one that was given;
        streams of shards begin anew, with other draws than at the epoch's start.
        """
        self._given = Counter(ranks[0]["given"])
        shape = self.state_dict()["shape"]
        if ranks[0]["shape"] == shape:
            mine = ranks[dist_utils.get_rank()]
            self._draw, self._positions = mine["draw"], dict(mine["positions"])
        else:
            self._draw, self._positions = f"{epoch}, from {first} on", {}
            logging.warning(
                "The checkpoint was written by %d ranks with %d loader workers and batches of %d, this run has %d, %d "
                "and %d: listed pairs go on where they were, shards are drawn anew from here on.",
                *(*ranks[0]["shape"], *shape),
            )


def validation_batches(
    name: str,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool = False,
    is_whole: bool = False,
) -> Iterator[Batch]:
    """Every sample of a data set once, shared out over the ranks, or all of them on each that asks (``is_whole``)."""
    rank, world = (0, 1) if is_whole else (dist_utils.get_rank(), dist_utils.get_world_size())
    place = Place(seed=seed, rank=rank, world_size=world, batch_size=batch_size)
    return _loader(_Batches(name, dataset, place, None), num_workers, pin_memory)

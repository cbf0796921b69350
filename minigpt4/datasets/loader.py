"""Batches for training, mixed from several sources, and for validation. What a run sees follows from its seed."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.sample import Place, Sample

Batch = dict[str, Any]  # image [B, 3, S, S]; text_input, instruction: B each; source: name; skipped: counts by kind


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
            worker=worker.id if worker else 0,
            num_workers=worker.num_workers if worker else 1,
            skipped=Counter(),
        )
        try:
            if self.num_batches is None:
                yield from self._validation(place)
            else:
                samples = self.dataset.endless(place)
                for _ in range(place.worker, self.num_batches, place.num_workers):
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
        return {
            "image": torch.stack([row["image"] for row in rows]),
            "text_input": [row["text_input"] for row in rows],
            "instruction": [row["instruction"] for row in rows],
            "source": self.name,
            "skipped": dict(skipped),  # a Counter would be doubled: the loader copies mappings with update()
        }


def _loader(batches: _Batches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    for batch in DataLoader(batches, batch_size=None, num_workers=num_workers, pin_memory=pin_memory):
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

    def _source_of(self, step: int) -> str:
        # str seeds hash alike on every platform and process
        return random.Random(f"{self.seed}:{step}").choices(list(self.sources), self.weights)[0]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; those of any epoch can be had without the ones before."""
        start = epoch * self.iters_per_epoch
        before = Counter(map(self._source_of, range(start)))
        order = [self._source_of(step) for step in range(start, start + self.iters_per_epoch)]
        streams = {}
        for name, num_batches in Counter(order).items():
            place = Place(
                seed=self.seed,
                rank=dist_utils.get_rank(),
                world_size=dist_utils.get_world_size(),
                epoch=epoch,
                batch_size=self.batch_size,
                first_batch=before[name],
            )
            batches = _Batches(name, self.sources[name], place, num_batches)
            streams[name] = _loader(batches, self.num_workers, self.pin_memory)
        for name in order:
            yield next(streams[name])


def validation_batches(
    name: str, dataset: Any, batch_size: int, num_workers: int, seed: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Every sample of a data set once, shared out over the ranks."""
    place = Place(seed=seed, rank=dist_utils.get_rank(), world_size=dist_utils.get_world_size(), batch_size=batch_size)
    return _loader(_Batches(name, dataset, place, None), num_workers, pin_memory)

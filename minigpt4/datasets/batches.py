"""Batches of one data set, made in loader workers, which send failures as values for the loader to raise.

A data set is map-style (``__len__`` and ``__getitem__``), a resumable stream (``iter_train`` and ``iter_eval``, see
``ShardDataset``), or any other iterable, which begins anew whenever it ends.
"""

import io
import logging
import pickle
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from minigpt4.common.device import local_seed
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.sample import (
    MAX_BAD_IN_A_ROW,
    Sample,
    SkipSample,
    WorkerInfo,
    derive_seed,
    no_usable_sample,
)

Place = tuple[int | str, int, int]  # of a sample: the pass over the data set, its place in the pass, its index


class LoadedBatch(NamedTuple):
    """What a worker sends; a tuple, in which the loader finds the tensors to pin."""

    batch: dict[str, Any] | None  # None: no sample was usable
    skipped: dict[str, int]  # no Counter: the loader copies mappings by update(), which would double it
    worker_id: int = 0
    position: dict[str, Any] | None = None  # of the worker's stream, behind the batch
    error: UserError | None = None


def is_map_style(dataset: Any) -> bool:
    """Whether samples are read by index; torch's base class has ``__getitem__`` even for iterables."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def check_kind(name: str, dataset: Any) -> None:
    """Raises UserError for an object that is no data set, or an empty one."""
    is_stream = hasattr(dataset, "iter_eval") or hasattr(dataset, "__iter__")
    if len(dataset) == 0 if is_map_style(dataset) else not is_stream:
        raise UserError(
            f"datasets.{name}: its builder returned {dataset!r:.80}; expected samples in a torch Dataset or "
            "IterableDataset, a webdataset DataPipeline, or an object with __len__ and __getitem__."
        )


def training_places(
    name: str, size: int, pass_size: int, seed: int, starts: Iterable[int], batch_size: int
) -> Iterator[list[Place]]:
    """The places of a batch from each start on, in samples since the run began.

    Each pass has another order; ``pass_size`` of its ``size`` samples are used.
    """

    @lru_cache(maxsize=2)
    def order(pass_index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, name, "order", pass_index))
        return torch.randperm(size, generator=generator)

    for start in starts:
        places = (divmod(number, pass_size) for number in range(start, start + batch_size))
        yield [(pass_index, place, int(order(pass_index)[place])) for pass_index, place in places]


@dataclass(eq=False)
class MapBatches(Dataset):
    """Batches of a map-style data set by the places of their samples.

    The random state of a sample is derived from its place, so that neither the number of workers nor a resume changes
    it. In training, an unusable sample (``SkipSample``) is replaced by a random one.
    """

    name: str
    dataset: Any
    seed: int
    is_train: bool

    def __getitem__(self, places: list[Place]) -> LoadedBatch:
        skipped: Counter = Counter()
        try:
            samples = [sample for place in places for sample in self._read(*place, skipped)]
            with local_seed(derive_seed(self.seed, self.name, *places[0], "collate")):
                return LoadedBatch(collate_batch(self.name, self.dataset, samples), dict(skipped))
        except Exception as error:
            return LoadedBatch(None, {}, error=describe_failure(self.name, error))

    def _read(self, pass_index: int | str, place: int, index: int, skipped: Counter) -> list[Sample]:
        with local_seed(derive_seed(self.seed, self.name, pass_index, place)):
            for _ in range(MAX_BAD_IN_A_ROW if self.is_train else 1):
                try:
                    return [self.dataset[index]]
                except SkipSample as skip:
                    skipped[str(skip)] += 1
                    index = int(torch.randint(len(self.dataset), ()))
        if self.is_train:
            hint = f"; first file: {self.dataset.first_file}" if hasattr(self.dataset, "first_file") else ""
            raise no_usable_sample(self.name, skipped, hint)
        return []


@dataclass(eq=False)
class StreamBatches(IterableDataset):
    """Batches of a stream: number k comes from worker k modulo their number. The last one may be smaller.

    Args:
        open_stream: from a worker and the counter of skipped samples to an iterator over samples, which may have a
            ``position``.
        worker: the rank's; each worker's own number is filled in.
        num_batches: of this rank.
        first_worker: whose stream gives the first batch, so that a resumed epoch continues the round-robin.
    """

    name: str
    dataset: Any
    open_stream: Callable[[WorkerInfo, Counter], Iterator[Sample]]
    worker: WorkerInfo
    batch_size: int
    num_batches: int = sys.maxsize
    first_worker: int = 0

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        slot, num_workers = (info.id, info.num_workers) if info else (0, 1)
        worker = replace(self.worker, worker_id=(slot + self.first_worker) % num_workers, num_workers=num_workers)
        skipped: Counter = Counter()
        try:
            stream = self.open_stream(worker, skipped)
            for number in range(slot, self.num_batches, num_workers):
                with local_seed(derive_seed(worker.seed, self.name, worker.index, number)):
                    samples = list(islice(stream, self.batch_size))
                    batch = collate_batch(self.name, self.dataset, samples)
                position = asdict(stream.position) if hasattr(stream, "position") else None
                yield LoadedBatch(batch, dict(skipped), worker.worker_id, position)
                skipped.clear()
                if len(samples) < self.batch_size:
                    break
        except Exception as error:
            yield LoadedBatch(None, {}, error=describe_failure(self.name, error))


def repeat_iterable(name: str, dataset: Any, worker: WorkerInfo, _: Counter) -> Iterator[Sample]:
    """The samples of an iterable, which begins anew whenever it ends; raises UserError if it is empty."""
    while True:
        sample = None
        for sample in dataset:
            yield sample
        if sample is None:
            where = f"loader worker {worker.worker_id} of {worker.num_workers}"
            raise UserError(f"Data set {name}: its iterator gives no sample to {where}; lower run.num_workers.")


class _SendCheck(pickle.Pickler):
    """Pickles all but tensors, which the loader sends through shared memory."""

    def persistent_id(self, value: Any) -> str | None:
        return "tensor" if isinstance(value, torch.Tensor) else None


def collate_batch(name: str, dataset: Any, samples: list[Sample]) -> dict[str, Any] | None:
    """Samples, if any, to a batch by the data set's ``collater``, else by torch's ``default_collate``."""
    if not samples:
        return None
    batch = getattr(dataset, "collater", default_collate)(samples)
    if not isinstance(batch, Mapping):
        raise UserError(f"Data set {name} makes batches of type {type(batch).__name__}; expected dicts.")
    if get_worker_info() is not None:  # the loader would wait forever for a batch that cannot be sent
        _SendCheck(io.BytesIO()).dump(batch)
    return dict(batch)


def describe_failure(name: str, error: Exception) -> UserError:
    """What ends a run for an exception of a data set; the traceback is logged here, where it is known."""
    if isinstance(error, UserError):
        return error
    logging.error("Data set %s failed.\n%s", name, "".join(traceback.format_exception(error)))
    return UserError(f"Data set {name} failed with {type(error).__name__}: {error}; its traceback is in the log above.")

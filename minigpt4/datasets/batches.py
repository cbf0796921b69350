"""Batches of one data set, made in loader workers.

Three kinds of data sets are read: map-style (``__len__`` and ``__getitem__``), resumable streams (``iter_train`` and
``iter_eval``, as ``ShardDataset`` has), and other iterables, which begin anew whenever they end.
"""

import io
import logging
import pickle
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from minigpt4.common.device import local_seed
from minigpt4.common.errors import UserError, see
from minigpt4.datasets.datasets.sample import MAX_BAD_IN_A_ROW, Sample, SkipSample, WorkerInfo, derive_seed

Place = tuple[int | str, int, int]  # of a sample: its pass, its place in the pass, its index
Chunk = tuple[list[Place], dict[str, int] | None]  # the places of a batch, and the position behind it


class LoadedBatch(NamedTuple):
    """What a worker sends; a tuple, in which the loader finds the tensors to pin."""

    batch: dict[str, Any] | None  # None: no sample was usable
    skipped: dict[str, int]  # a dict, as the loader copies mappings by update(), which doubles a Counter
    worker_id: int = 0
    position: dict[str, Any] | None = None  # behind the batch
    error: UserError | None = None


def is_map_style(dataset: Any) -> bool:
    """Whether samples are read by index; torch's base class has ``__getitem__`` even for iterables."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def check_kind(name: str, dataset: Any) -> None:
    """Raises UserError for an object that is none of the three kinds, or empty."""
    if is_map_style(dataset):
        found = "" if len(dataset) else f"an empty {type(dataset).__name__}"
    else:
        found = "" if hasattr(dataset, "iter_eval") or hasattr(dataset, "__iter__") else f"a {type(dataset).__name__}"
    if found:
        raise UserError(
            f"datasets.{name}: its builder returned {found}; expected samples in a torch Dataset or IterableDataset, a "
            "webdataset DataPipeline, or an object with __len__ and __getitem__."
        )


class PassSampler(Sampler[Chunk]):
    """Training batches of one rank: each pass visits every sample once, in another order.

    Samples at the end of a pass that do not fill a batch on every rank are dropped. If ``drop_last`` is False, or the
    data set is smaller than such a batch, batches extend into the next pass instead: then the sequence of samples of
    all ranks depends neither on their number nor on the batch size.
    """

    def __init__(
        self, name: str, size: int, worker: WorkerInfo, batch_size: int, num_batches: int, drop_last: bool
    ) -> None:
        self.name = name
        self.size = size
        self.worker = worker
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.step = batch_size * worker.world_size  # samples of a batch on all ranks
        self.drop_last = drop_last and self.step <= size
        self.position = {"pass_index": 0, "offset": 0}
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def position_after(self, num_batches: int) -> dict[str, int]:
        """The position after a number of batches since the run began."""
        if self.drop_last:
            pass_index, done = divmod(num_batches, self.size // self.step)
            return {"pass_index": pass_index, "offset": done * self.step}
        return self._normalise(0, num_batches * self.step)

    def _normalise(self, pass_index: int, offset: int) -> dict[str, int]:
        return {"pass_index": pass_index + offset // self.size, "offset": offset % self.size}

    def __iter__(self) -> Iterator[Chunk]:
        pass_index, offset = self.position["pass_index"], self.position["offset"]
        for _ in range(self.num_batches):
            if self.drop_last and offset + self.step > self.size:
                pass_index, offset = pass_index + 1, 0
            start = offset + self.worker.rank * self.batch_size
            places = [self._place(pass_index, start + row) for row in range(self.batch_size)]
            end = self._normalise(pass_index, offset + self.step)
            yield places, end
            pass_index, offset = end["pass_index"], end["offset"]

    def _place(self, pass_index: int, offset: int) -> Place:
        extra, place = divmod(offset, self.size)
        return pass_index + extra, place, int(self._order(pass_index + extra)[place])

    def _draw_order(self, pass_index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.worker.seed, self.name, "order", pass_index))
        return torch.randperm(self.size, generator=generator)


class EvalSampler(Sampler[Chunk]):
    """Evaluation batches of one rank: over all ranks, every sample once, in order."""

    def __init__(self, size: int, worker: WorkerInfo, batch_size: int) -> None:
        places = [("eval", index, index) for index in range(worker.rank, size, worker.world_size)]
        self.chunks: list[Chunk] = [(places[i : i + batch_size], None) for i in range(0, len(places), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)


class MapBatches(Dataset):
    """Batches of a map-style data set, one per chunk of a sampler.

    The random state of a sample is derived from its pass and its place in it, so that neither the number of workers
    nor a resume changes it. In training, an unusable sample (``SkipSample``) is replaced by a random one.
    """

    def __init__(self, name: str, dataset: Any, seed: int, is_train: bool) -> None:
        self.name = name
        self.dataset = dataset
        self.seed = seed
        self.is_train = is_train

    def __getitem__(self, chunk: Chunk) -> LoadedBatch:
        (places, end), samples, skipped = chunk, [], Counter()
        try:
            for pass_index, place, index in places:
                with local_seed(derive_seed(self.seed, self.name, pass_index, place)):
                    samples += self._read(index, skipped)
            with local_seed(derive_seed(self.seed, self.name, *places[0], "collate")):
                batch = collate_batch(self.name, self.dataset, samples) if samples else None
        except Exception as error:
            return LoadedBatch(None, {}, error=describe_failure(self.name, error))
        return LoadedBatch(batch, dict(skipped), position=end)

    def _read(self, index: int, skipped: Counter) -> list[Sample]:
        for _ in range(MAX_BAD_IN_A_ROW if self.is_train else 1):
            try:
                return [self.dataset[index]]
            except SkipSample as skip:
                skipped[str(skip)] += 1
                index = int(torch.randint(len(self.dataset), ()))
        if not self.is_train:
            return []
        kinds = ", ".join(f"{count} × {kind}" for kind, count in skipped.items())
        first = f"; first file: {self.dataset.first_file}" if hasattr(self.dataset, "first_file") else ""
        raise UserError(f"Data set {self.name} has no usable sample ({kinds}){first}.{see('silent-data-failure')}")


class StreamBatches(IterableDataset):
    """Batches of a stream: batch number k comes from worker k modulo their number.

    Args:
        name: of the data set.
        dataset: for its ``collater``.
        open_stream: from a worker and the counter of skipped samples to an iterator over samples, which may have a
            ``position``.
        worker: the rank's; the worker's own number is filled in.
        batch_size: samples per batch; only the last batch of a finite stream may have fewer.
        num_batches: of this rank; as many as the stream gives by default.
        first_worker: whose stream gives the first batch, where a resumed epoch continues the round-robin.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        open_stream: Callable[[WorkerInfo, Counter], Iterator[Sample]],
        worker: WorkerInfo,
        batch_size: int,
        num_batches: int = sys.maxsize,
        first_worker: int = 0,
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.open_stream = open_stream
        self.worker = worker
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.first_worker = first_worker

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
                    batch = collate_batch(self.name, self.dataset, samples) if samples else None
                position = asdict(stream.position) if hasattr(stream, "position") else None
                yield LoadedBatch(batch, dict(skipped), worker.worker_id, position)
                skipped.clear()
                if len(samples) < self.batch_size:
                    break
        except Exception as error:
            yield LoadedBatch(None, {}, error=describe_failure(self.name, error))


def repeat_iterable(name: str, dataset: Any, worker: WorkerInfo) -> Iterator[Sample]:
    """The samples of an iterable, which begins anew whenever it ends; raises UserError if it is empty."""
    while True:
        sample = None
        for sample in dataset:
            yield sample
        if sample is None:
            raise UserError(
                f"Data set {name}: its iterator gives no sample to loader worker {worker.worker_id} of "
                f"{worker.num_workers}; expected at least one for each, so perhaps lower run.num_workers."
            )


class _SendCheck(pickle.Pickler):
    """Pickles all but tensors, which the loader sends through shared memory."""

    def persistent_id(self, value: Any) -> str | None:
        return "tensor" if isinstance(value, torch.Tensor) else None


def collate_batch(name: str, dataset: Any, samples: list[Sample]) -> dict[str, Any]:
    """Samples to a batch by the data set's own ``collater``, else by torch's ``default_collate``."""
    batch = getattr(dataset, "collater", default_collate)(samples)
    if not isinstance(batch, Mapping):
        raise UserError(
            f"Data set {name} makes batches of type {type(batch).__name__}; expected dicts, as its samples."
        )
    if get_worker_info() is not None:  # the loader would wait for ever for a batch that cannot be sent
        _SendCheck(io.BytesIO()).dump(batch)
    return dict(batch)


def describe_failure(name: str, error: Exception) -> UserError:
    """What ends a run for an exception of a data set; the traceback is logged here, where it is known.

    Batches carry it: raised in a worker, its traceback would keep the loader and the other workers alive.
    """
    if isinstance(error, UserError):
        return error
    logging.error("Data set %s failed.\n%s", name, "".join(traceback.format_exception(error)))
    return UserError(f"Data set {name} failed with {type(error).__name__}: {error}; its traceback is in the log above.")

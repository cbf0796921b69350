"""Shards of img2dataset in the webdataset format: laion and cc_sbu of stage 1."""

import itertools
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from minigpt4.common.device import local_seed
from minigpt4.common.errors import UserError
from minigpt4.common.http_stream import Unreachable
from minigpt4.common.images import EXTENSIONS
from minigpt4.common.utils import decode_text, parse_json
from minigpt4.datasets.datasets.sample import (
    MAX_BAD_IN_A_ROW,
    ImageProcessor,
    Sample,
    SkipSample,
    StreamPosition,
    TextProcessor,
    WorkerInfo,
    check_caption,
    collate,
    derive_seed,
    file_identity,
    no_usable_sample,
    prepare_image,
)
from minigpt4.datasets.datasets.shard_urls import ShardFile

IMAGE_KEYS = tuple(extension[1:] for extension in EXTENSIONS)
MAX_EMPTY_SHARDS_IN_A_ROW = 20
MAX_UNREACHABLE_SHARDS_IN_A_ROW = 2  # after all attempts at each


@dataclass(eq=False)
class ShardDataset:
    """Tar files of KEY.jpg (or another extension of images) beside KEY.json ({"caption": …}) or KEY.txt.

    Args:
        name: of the data set, for seeds and messages.
        shards: paths or URLs of the tar files, see ``expand_shards``.
        vis_processor: from an RGB image to float32 [3, S, S].
        text_processor: from caption to caption.
        shuffle_buffer: undecoded samples in the buffer from which each worker draws.
        timeout, retries: of connections and commands, see ``open_stream``.
    """

    name: str
    shards: list[str]
    vis_processor: ImageProcessor
    text_processor: TextProcessor = str
    shuffle_buffer: int = 1000
    timeout: float = 30.0
    retries: int = 5
    collater = staticmethod(collate)

    def iter_train(
        self,
        worker: WorkerInfo,
        shuffle_key: int | str = 0,
        position: StreamPosition | None = None,
        skipped: Counter | None = None,
    ) -> "ShardStream":
        """One worker's endless stream of samples: shards drawn with replacement, samples shuffled in a buffer.

        Other workers, and other keys, draw other samples. Unusable samples are counted in ``skipped`` by kind.
        """
        seed = derive_seed(worker.seed, self.name, shuffle_key, worker.rank, worker.worker_id)
        return ShardStream(self, seed, position or StreamPosition(), Counter() if skipped is None else skipped)

    def iter_eval(self, worker: WorkerInfo, skipped: Counter | None = None) -> Iterator[Sample]:
        """This worker's share of all samples, each once; unusable ones are counted in ``skipped``."""
        skipped = Counter() if skipped is None else skipped
        for raw in itertools.islice(self.read(self.shards, skipped), worker.index, None, worker.count):
            try:
                yield self.process(raw)
            except SkipSample as skip:
                skipped[str(skip)] += 1

    def process(self, raw: dict[str, Any]) -> Sample:
        """Decodes and processes one undecoded sample; raises SkipSample if it is unusable."""
        if (image := _pick(raw, IMAGE_KEYS)) is None:
            raise SkipSample("no image")
        caption = self.text_processor(check_caption(_caption(raw)))
        return {"image": prepare_image(image, self.vis_processor), "text_input": caption, "instruction": None}

    @property
    def num_parts(self) -> int:
        """The number of files of a feature cache: one per shard."""
        return len(self.shards)

    def iter_part(self, part: int, skipped: Counter) -> Iterator[Callable[[], Sample]]:
        """Functions that process one sample of a shard each."""
        return (partial(self.process, raw) for raw in self.read([self.shards[part]], skipped))

    def identity(self) -> list[Any]:
        """What the features and texts in a cache depend on: the shards with their sizes and times."""
        return [file_identity(shard) for shard in self.shards]

    def read(
        self, shards: list[str], skipped: Counter, failures: list[Exception] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Undecoded samples of shards in order; unreadable shards are counted, and used as far as they go.

        What ended the reading of each of these is added to ``failures``.
        """
        for shard in shards:
            errors: list[Exception] = []
            is_empty = True
            try:
                with closing(ShardFile(shard, self.timeout, self.retries)) as file:
                    for raw in _samples(file, errors, skipped):
                        is_empty = False
                        yield raw
            except Exception as error:  # of the archive, the connection or its client
                errors.append(error)
            if errors:
                skipped["unreachable shard" if isinstance(errors[0], Unreachable) else "unreadable shard"] += 1
                logging.warning("%s: shard %s cannot be read any further: %s", self.name, shard, _text(errors[0]))
                if failures is not None:
                    failures.append(errors[0])
            elif is_empty:
                skipped["empty shard"] += 1

    def no_usable_sample(self, skipped: Counter) -> UserError:
        """The error for shards without any usable sample."""
        actual = f" in {len(self.shards)} shards, such as {self.shards[0]}{self._describe_first()}. Expected "
        expected = (
            'KEY.jpg beside KEY.json ({"caption": text}) or KEY.txt, KEY without dot; see dataset/README_1_STAGE.md'
        )
        return no_usable_sample(self.name, skipped, actual + expected)

    def _describe_first(self) -> str:
        """What the first shard begins with: names of its files, and the types of the values of a JSON file."""
        failures: list[Exception] = []
        raws = list(itertools.islice(self.read(self.shards[:1], Counter(), failures), 4))
        names = [f"{raw['__key__']}.{key}" for raw in raws for key in raw if not key.startswith("__")][:6]
        text = f", which begins with {', '.join(names)}" if names else ""
        text += f", which cannot be read ({_text(failures[0])})" if failures else ""
        with suppress(UserError, StopIteration):
            content = parse_json(next(raw["json"] for raw in raws if "json" in raw), "")
            types = {key: type(value).__name__ for key, value in content.items()} if isinstance(content, dict) else {}
            text += f"; a JSON file has {', '.join(map(' of type '.join, types.items())) or type(content).__name__}"
        return text


@dataclass
class _Item:
    """Undecoded sample number ``index`` of shard draw number ``draw``; ``raw`` is None while fast-forwarding."""

    draw: int
    index: int
    raw: dict[str, Any] | None


class ShardStream(Iterator[Sample]):
    """An endless iterator over one worker's samples that can start at any position of itself.

    The buffer's content at a position depends only on the seed and on the sizes of the shards drawn so far. To resume,
    the draws and swaps are repeated with the stored sizes, and only samples still in the buffer are read.
    """

    def __init__(self, dataset: ShardDataset, seed: int, position: StreamPosition, skipped: Counter) -> None:
        self._dataset = dataset
        self._seed = seed
        self._rng = random.Random(seed)
        self._skipped = skipped
        self._num_samples = 0
        self._drawn: list[str] = []  # shards
        self._sizes: list[int] = []  # of the shards that were read to the end
        self._known_sizes = position.shard_sizes
        self._buffer: list[_Item] = []
        self._is_resuming = False
        self._items = self._shuffle()
        if position != StreamPosition():
            self._fast_forward(position)

    @property
    def position(self) -> StreamPosition:
        """The position behind the last sample returned."""
        return StreamPosition(self._num_samples, tuple(self._sizes))

    def __next__(self) -> Sample:
        """The next usable sample; raises UserError if there is none for a long stretch."""
        for _ in range(MAX_BAD_IN_A_ROW):
            item = next(self._items)
            self._num_samples += 1
            try:
                with local_seed(derive_seed(self._seed, self._num_samples)):
                    return self._dataset.process(item.raw)
            except SkipSample as skip:
                self._skipped[str(skip)] += 1
        raise self._dataset.no_usable_sample(self._skipped)

    def _fast_forward(self, position: StreamPosition) -> None:
        self._is_resuming = True
        for _ in range(position.num_samples):
            next(self._items)
        self._num_samples = position.num_samples
        missing = [item for item in self._buffer if item.raw is None]
        failures: list[Exception] = []
        for draw in {item.draw for item in missing}:
            items = {item.index: item for item in missing if item.draw == draw}
            raws = self._dataset.read([self._drawn[draw]], Counter(), failures)
            for index, raw in zip(range(max(items) + 1), raws, strict=False):
                if index in items:
                    items[index].raw = raw
        if len(self._sizes) != len(position.shard_sizes) or any(item.raw is None for item in missing):
            raise self._cannot_resume(failures)
        self._skipped.clear()  # already counted before the resume
        self._is_resuming = False

    def _cannot_resume(self, failures: list[Exception]) -> UserError:
        shards = ", ".join(sorted(set(self._drawn)))
        reasons = [_text(error) for error in failures if isinstance(error, OSError)]
        if reasons:
            reason = f"a shard that the resumed run needs cannot be read ({reasons[0]}), one of {shards}"
            return UserError(f"Data set {self._dataset.name}: {reason}; resume when it can.")
        return UserError(
            f"Data set {self._dataset.name}: a shard no longer holds the samples that it held when the checkpoint was "
            f"written, one of {shards}; restore the old file, or resume with another run.seed."
        )

    def _shuffle(self) -> Iterator[_Item]:
        # The buffer is filled to a tenth before the first sample is returned; then it grows to its full size.
        buffer, size = self._buffer, self._dataset.shuffle_buffer
        for count, item in enumerate(self._read(), 1):
            buffer.append(item)
            is_growing = len(buffer) < size and (len(buffer) < size // 10 or count % 2)
            if not is_growing:
                i = self._rng.randrange(len(buffer))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                yield buffer.pop()

    def _read(self) -> Iterator[_Item]:
        num_empty = num_unreachable = 0
        for draw in itertools.count():
            shard = self._rng.choice(self._dataset.shards)
            self._drawn.append(shard)
            failures: list[Exception] = []
            is_known = draw < len(self._known_sizes)
            raws = (
                [None] * self._known_sizes[draw] if is_known else self._dataset.read([shard], self._skipped, failures)
            )
            index = -1
            for index, raw in enumerate(raws):
                yield _Item(draw, index, raw)
            if failures and self._is_resuming:  # before the resume, this shard could be read further
                raise self._cannot_resume(failures)
            self._sizes.append(index + 1)
            num_empty = num_empty + 1 if index < 0 else 0
            is_unreachable = index < 0 and any(isinstance(error, Unreachable) for error in failures)
            num_unreachable = num_unreachable + 1 if is_unreachable else 0
            if num_unreachable == MAX_UNREACHABLE_SHARDS_IN_A_ROW:
                raise UserError(
                    f"Data set {self._dataset.name}: {num_unreachable} shards in a row cannot be fetched, the last one "
                    f"is {shard} ({_text(failures[-1])}); see to its server, or raise build_info.timeout or retries."
                )
            if num_empty == MAX_EMPTY_SHARDS_IN_A_ROW:
                raise self._dataset.no_usable_sample(self._skipped)


def _samples(file: ShardFile, errors: list[Exception], skipped: Counter) -> Iterator[dict[str, Any]]:
    """The samples of a shard as webdataset reads and groups them; what makes it unreadable is added to ``errors``."""

    def handler(error: Exception) -> bool:
        if "duplicate file name" in _text(error):
            skipped["duplicate file in a shard"] += 1
        else:
            errors.append(error)
        return True

    files = tar_file_expander([{"url": file.shard, "stream": file}], handler=handler, select_files=file.start_file)
    yield from group_by_keys(files, keys=key_and_suffix, handler=handler)
    if not errors:
        file.finish()


def _text(error: Exception) -> str:
    first = error.args[0] if error.args else None
    text = re.sub(r" @ \S+$", "", first) if isinstance(first, str) else str(error)  # webdataset appends " @ SHARD"
    return " ".join(text[:1000].split())[:200]


def key_and_suffix(name: str) -> tuple[str | None, str | None]:
    """``DIR/KEY.SUFFIX`` as (DIR/KEY, SUFFIX), KEY without a dot; (None, None) for other names.

    As webdataset's own function, whose pattern takes minutes for a name of many slashes.
    """
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return (folder + slash + key, suffix) if key and dot else (None, None)


def _pick(raw: dict[str, Any], kinds: Sequence[str]) -> bytes | None:
    """The file of one of the kinds: KEY.jpg, or the only one such as KEY.image.jpg."""
    exact = next((raw[kind] for kind in kinds if kind in raw), None)
    others = [raw[key] for key in raw if key.rpartition(".")[2] in kinds]
    return others[0] if exact is None and len(others) == 1 else exact


def _caption(raw: dict[str, Any]) -> Any:
    try:
        data = _pick(raw, ("json",))
        content = None if data is None else parse_json(data, "it")
    except UserError as error:
        raise SkipSample("unreadable json") from error
    for key in ("caption", "text"):
        if isinstance(content, dict) and content.get(key) is not None:
            return content[key]
    try:
        text = _pick(raw, ("txt",))
        return None if text is None else decode_text(text, "it").strip()
    except UserError as error:
        raise SkipSample("unreadable text") from error

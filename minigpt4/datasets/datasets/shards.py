"""Shards of img2dataset in the webdataset form: laion and cc_sbu of stage 1."""

import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from webdataset.tariterators import group_by_keys

from minigpt4.common.device import local_seed
from minigpt4.common.errors import UserError, see
from minigpt4.datasets.datasets.sample import (
    MAX_BAD_IN_A_ROW,
    ImageProcessor,
    Place,
    Sample,
    SkipSample,
    TextProcessor,
    check_caption,
    file_identity,
    prepare_image,
)
from minigpt4.datasets.datasets.tar_files import key_and_suffix, read_files

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
MAX_EMPTY_SHARDS_IN_A_ROW = 20


class ShardDataset:
    """Tar files of KEY.jpg (jpeg, png, webp) with KEY.json ({"caption": …}) or KEY.txt.

    Args:
        name: of the data set, for seeds and messages.
        shards: paths or URLs of the tar files, see ``expand_shards``.
        vis_processor: an image processor, or a function from RGB image to tensor [3, S, S].
        text_processor: caption to caption.
        shuffle_buffer: undecoded samples that a worker holds to draw from.
    """

    def __init__(
        self,
        name: str,
        shards: list[str],
        vis_processor: ImageProcessor,
        text_processor: TextProcessor = str,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.name = name
        self.shards = shards
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.shuffle_buffer = shuffle_buffer

    def endless(self, place: Place) -> Iterator[Sample]:
        """Samples for ever: shards drawn with replacement, shuffled in a buffer, anew for each ``place.draw``.

        Raises:
            UserError: the shards are empty, or hold nothing usable for a long stretch.
        """
        names = self.name, place.draw, place.rank, place.worker
        stream = _Stream(self, random.Random(place.sub_seed(*names)), place.skipped)
        if position := place.positions.get(place.worker):
            stream.go_to(*position)
        num_bad = 0
        for raw in stream:
            place.position = stream.position
            try:
                with local_seed(place.sub_seed(*names, stream.number - 1)):
                    sample = self.process(raw)
                num_bad = 0
            except SkipSample as skip:
                place.skipped[str(skip)] += 1
                num_bad += 1
                if num_bad == MAX_BAD_IN_A_ROW:
                    raise UserError(self.nothing_usable(place.skipped)) from skip
                continue
            yield sample

    def once(self, place: Place) -> Iterator[Sample]:
        """This part's share of all samples, each once; what cannot be used is counted."""
        for number, raw in enumerate(self.read(self.shards, place.skipped)):
            if number % place.count == place.index:
                try:
                    yield self.process(raw)
                except SkipSample as skip:
                    place.skipped[str(skip)] += 1

    def process(self, raw: dict[str, Any]) -> Sample:
        """Decodes and processes one undecoded sample; raises SkipSample where it cannot be used."""
        image = next((raw[key] for key in IMAGE_KEYS if key in raw), None)
        if image is None:
            raise SkipSample("no image")
        caption = check_caption(_caption(raw))
        return {
            "image": prepare_image(image, self.vis_processor),
            "text_input": self.text_processor(caption),
            "instruction": None,
        }

    @property
    def num_parts(self) -> int:
        """Files of a feature cache, one a shard."""
        return len(self.shards)

    def samples_of(self, part: int, skipped: Counter) -> Iterator[Callable[[], Sample]]:
        """Functions that process the samples of a shard, one each."""
        for raw in self.read([self.shards[part]], skipped):
            yield partial(self.process, raw)

    def identity(self) -> list[Any]:
        """What a cache of this data set holds on to: the shards with their sizes and times."""
        return [file_identity(shard) for shard in self.shards]

    def read(self, shards: list[str], skipped: Counter) -> Iterator[dict[str, Any]]:
        """Undecoded samples of shards in their order; what cannot be read is counted."""
        handler = self._counting(skipped)
        return group_by_keys(read_files(shards, handler, skipped), keys=key_and_suffix, handler=handler)

    def _counting(self, skipped: Counter) -> Callable[[Exception], bool]:
        def handler(error: Exception) -> bool:
            is_duplicate = isinstance(error, ValueError) and "duplicate file name" in str(error)
            skipped["duplicate file in a shard" if is_duplicate else "unreadable shard"] += 1
            if not is_duplicate:
                logging.warning("%s: a shard cannot be read on: %s", self.name, str(error)[:200])
            return True

        return handler

    def nothing_usable(self, skipped: Counter) -> str:
        """A message for shards that hold no usable sample."""
        kinds = ", ".join(f"{count} × {kind}" for kind, count in skipped.items()) or "the shards are empty"
        return (
            f"Data set {self.name} gives no usable sample ({kinds}) in {len(self.shards)} shards, as {self.shards[0]}. "
            "Expected tar files of KEY.jpg with KEY.json or KEY.txt; see dataset/README_1_STAGE.md."
            + see("silent-data-failure")
        )


@dataclass
class _Item:
    """One undecoded sample: number ``index`` of shard draw number ``draw``; not read where it was given out before."""

    draw: int
    index: int
    raw: dict[str, Any] | None


class _Stream:
    """One worker's undecoded samples: shards drawn with replacement, mixed in a buffer, from any position on.

    What lies in the buffer at a position follows from the seed and from how many samples the shards drawn so far hold:
    to go there, draws and swaps are repeated with those numbers alone, and what the buffer then lacks is read.
    """

    def __init__(self, dataset: ShardDataset, rng: random.Random, skipped: Counter) -> None:
        self.number = 0  # samples given so far
        self._dataset = dataset
        self._rng = rng
        self._skipped = skipped
        self._drawn: list[str] = []
        self._sizes: list[int] = []  # of the shards that were read to their ends
        self._known: list[int] = []  # sizes that are known beforehand
        self._buffer: list[_Item] = []
        self._items = self._shuffled()

    @property
    def position(self) -> tuple[int, list[int]]:
        """What ``go_to`` takes to go on behind the last sample."""
        return self.number, list(self._sizes)

    def go_to(self, number: int, sizes: list[int]) -> None:
        """Goes to a position of an equal stream; UserError where the shards are not what they were."""
        self._known = sizes
        for _ in range(number):
            next(self._items)
        self.number = number
        lacking = [item for item in self._buffer if item.raw is None]
        for draw in {item.draw for item in lacking}:
            items = {item.index: item for item in lacking if item.draw == draw}
            raws = self._dataset.read([self._drawn[draw]], Counter())
            for index, raw in zip(range(max(items) + 1), raws, strict=False):
                if index in items:
                    items[index].raw = raw
        if len(self._sizes) != len(sizes) or any(item.raw is None for item in lacking):
            shards = ", ".join(sorted(set(self._drawn)))
            raise UserError(
                f"Data set {self._dataset.name}: a shard no longer holds the samples that it held when the run was "
                f"left, one of {shards}; put the old file back, or go on with another run.seed."
            )
        self._skipped.clear()  # told by the run that was left

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for item in self._items:
            self.number += 1
            yield item.raw

    def _shuffled(self) -> Iterator[_Item]:
        # Filled to a tenth before the first sample goes out, then growing to its full size while samples flow.
        buffer, size = self._buffer, self._dataset.shuffle_buffer
        for count, item in enumerate(self._read(), 1):
            buffer.append(item)
            is_growing = len(buffer) < size and (len(buffer) < size // 10 or count % 2)
            if not is_growing:
                i = self._rng.randrange(len(buffer))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                yield buffer.pop()

    def _read(self) -> Iterator[_Item]:
        num_empty = 0
        for draw in itertools.count():
            shard = self._rng.choice(self._dataset.shards)
            self._drawn.append(shard)
            is_known = draw < len(self._known)
            raws = [None] * self._known[draw] if is_known else self._dataset.read([shard], self._skipped)
            index = -1
            for index, raw in enumerate(raws):
                yield _Item(draw, index, raw)
            self._sizes.append(index + 1)
            num_empty = num_empty + 1 if index < 0 else 0
            if num_empty == MAX_EMPTY_SHARDS_IN_A_ROW:
                raise UserError(self._dataset.nothing_usable(self._skipped))


def _caption(raw: dict[str, Any]) -> Any:
    if "json" in raw:
        try:
            content = json.loads(raw["json"])
        except (ValueError, RecursionError) as error:
            raise SkipSample("unreadable json") from error
        if isinstance(content, dict) and content.get("caption") is not None:
            return content["caption"]
    if "txt" in raw:
        return raw["txt"].decode("utf-8", errors="replace").strip()
    return None

"""Image files and their texts, listed beforehand: cc_sbu_align and one's own pictures."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.device import local_seed
from minigpt4.common.errors import UserError, see
from minigpt4.common.utils import IMAGE_PLACEHOLDER, parse_json, read_plain_file
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

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """One image file, its caption, and the question that the caption answers where there is one."""

    image: Path
    caption: str
    instruction: str | None = None


class ListedDataset:
    """Samples that can be indexed; subclasses give ``__len__``, ``__getitem__`` and ``first_place``.

    Args:
        name: of the data set, for seeds and messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def endless(self, place: Place) -> Iterator[Sample]:
        """Samples for ever, each once a pass in a fresh order, from the place's first sample on.

        What stands at a position of the run depends on the seed alone, not on the number of workers or ranks.
        """
        for batch in itertools.count(place.turn, place.num_workers):
            for row in range(place.batch_size):
                position = (batch * place.world_size + place.rank) * place.batch_size + row
                yield self._sample_at(place.first_sample + position, place)

    def _sample_at(self, position: int, place: Place) -> Sample:
        """The sample of a position; one that cannot be used gives way to another drawn one."""
        passes, within = divmod(position, len(self))
        index = int(self._order(passes, place)[within])
        with local_seed(place.sub_seed(self.name, "sample", position)):
            for _ in range(MAX_BAD_IN_A_ROW):
                try:
                    return self[index]
                except SkipSample as skip:
                    place.skipped[str(skip)] += 1
                    index = int(torch.randint(len(self), ()))
        kinds = ", ".join(f"{count} × {kind}" for kind, count in place.skipped.items())
        told = f"Data set {self.name} gives no usable sample ({kinds}); first file: {self.first_place}."
        raise UserError(told + see("silent-data-failure"))

    def _order(self, passes: int, place: Place) -> torch.Tensor:
        if getattr(self, "_cached_pass", None) != (passes, place.seed):
            generator = torch.Generator().manual_seed(place.sub_seed(self.name, "order", passes))
            self._cached_order = torch.randperm(len(self), generator=generator)
            self._cached_pass = (passes, place.seed)
        return self._cached_order

    def once(self, place: Place) -> Iterator[Sample]:
        """This part's share of all samples, in order, each once; what cannot be used is counted."""
        for index in range(place.index, len(self), place.count):
            try:
                yield self[index]
            except SkipSample as skip:
                place.skipped[str(skip)] += 1


class PairDataset(ListedDataset):
    """Image files and their captions.

    Args:
        name: of the data set, for seeds and messages.
        pairs: all of them.
        vis_processor: an image processor, or a function from RGB image to tensor [3, S, S].
        text_processor: caption to caption.
    """

    PART = 1024  # pairs whose features stand in one file of a cache

    def __init__(
        self, name: str, pairs: Sequence[Pair], vis_processor: ImageProcessor, text_processor: TextProcessor = str
    ) -> None:
        super().__init__(name)
        self.pairs = list(pairs)
        self.vis_processor = vis_processor
        self.text_processor = text_processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Reads and processes one pair; raises SkipSample where the file is missing or damaged."""
        pair = self.pairs[index]
        caption = check_caption(pair.caption)
        try:
            data = read_plain_file(pair.image)
        except FileNotFoundError as error:
            raise SkipSample("missing image file") from error
        except OSError as error:
            raise SkipSample("unreadable image") from error
        return {
            "image": prepare_image(data, self.vis_processor),
            "text_input": self.text_processor(caption),
            "instruction": pair.instruction,
        }

    @property
    def first_place(self) -> str:
        """Where the first sample is, for messages."""
        return str(self.pairs[0].image)

    @property
    def num_parts(self) -> int:
        """Files of a feature cache."""
        return -(-len(self) // self.PART)

    def samples_of(self, part: int, skipped: Counter) -> Iterator[Callable[[], Sample]]:
        """Functions that read and process the samples of a part, one each."""
        for index in range(part * self.PART, min(len(self), (part + 1) * self.PART)):
            yield partial(self.__getitem__, index)

    def identity(self) -> list[Any]:
        """What a cache of this data set holds on to: files with their sizes and times, and texts."""
        return [[*file_identity(pair.image), pair.caption, pair.instruction] for pair in self.pairs]


def read_align_folder(folder: Path, key: str) -> list[Pair]:
    """Reads a folder as cc_sbu_align is one: filter_cap.json and image/ID.jpg.

    Raises:
        UserError: the file is missing or of another form.
    """
    file = folder / "filter_cap.json"
    if not file.is_file():
        raise UserError(
            f"{key}: {folder} has no filter_cap.json; expected it beside a folder image/ with ID.jpg files."
        )
    content = parse_json(file.read_bytes(), f"{key}: {file}")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise UserError(
            f'{key}: {file} has no annotations; expected {{"annotations": [{{"image_id", "caption"}}, …]}}.'
        )
    pairs = []
    for i, entry in enumerate(annotations):
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            raise UserError(f"{key}: annotation {i} of {file} is {str(entry)[:80]}; expected image_id and caption.")
        image_id = str(entry["image_id"])
        _refuse_outside(image_id, f"{key}: image_id of annotation {i} of {file}")
        pairs.append(Pair(folder / "image" / f"{image_id}.jpg", entry["caption"]))
    return pairs


def read_pairs(path: Path, key: str) -> list[Pair]:
    """Reads one's own pictures: a JSONL file of {"image", "caption"[, "instruction"]} with paths relative to it, a
    folder with one such file, or a folder of images each beside a .txt of the same name.

    Raises:
        UserError: nothing is found, or a row is of another form.
    """
    if path.is_file():
        return _read_jsonl(path, key)
    lists = sorted(path.glob("*.jsonl"))
    if len(lists) > 1:
        names = ", ".join(file.name for file in lists)
        raise UserError(f"{key}: {path} has several JSONL files ({names}); name the one that is meant.")
    if lists:
        return _read_jsonl(lists[0], key)
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_TYPES)
    pairs = [
        Pair(image, image.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip())
        for image in images
        if image.with_suffix(".txt").is_file()
    ]
    if not pairs:
        raise UserError(
            f"{key}: {path} has {len(images)} images and none has a .txt of the same name beside it; "
            "expected that, or one JSONL file."
        )
    return pairs


def _read_jsonl(file: Path, key: str) -> list[Pair]:
    pairs = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{key}: line {number} of {file}")
        texts = [row.get(name) for name in ("image", "caption")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{key}: line {number} of {file} is {str(row)[:80]}; expected image and caption as texts.")
        instruction = row.get("instruction")
        if instruction is not None and (not isinstance(instruction, str) or IMAGE_PLACEHOLDER in instruction):
            text = str(instruction)[:80]
            raise UserError(
                f"{key}: instruction in line {number} of {file} is '{text}'; "
                f"expected a text without {IMAGE_PLACEHOLDER}."
            )
        pairs.append(Pair(file.parent / texts[0], texts[1], instruction))
    if not pairs:
        raise UserError(f"{key}: {file} is empty; expected a row an image.")
    return pairs


def _refuse_outside(name: str, where: str) -> None:
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise UserError(f"{where} is '{name[:80]}'; expected the name of a file in image/ without its .jpg.")

"""Image files and their texts from a list: cc_sbu_align and own pictures."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER, parse_json, read_plain_file
from minigpt4.datasets.datasets.sample import (
    ImageProcessor,
    Sample,
    SkipSample,
    TextProcessor,
    check_caption,
    collate,
    file_identity,
    prepare_image,
)

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """One image file, its caption, and the question that the caption answers, if any."""

    image: Path
    caption: str
    instruction: str | None = None


class PairDataset(Dataset):
    """Image files and their captions.

    Args:
        name: of the data set, for messages.
        pairs: all of them.
        vis_processor: from an RGB image to float32 [3, S, S].
        text_processor: from caption to caption.
    """

    PAIRS_PER_PART = 1024  # in one file of a feature cache
    collater = staticmethod(collate)
    drop_last = False  # every pair is used in each pass

    def __init__(
        self, name: str, pairs: Sequence[Pair], vis_processor: ImageProcessor, text_processor: TextProcessor = str
    ) -> None:
        self.name = name
        self.pairs = list(pairs)
        self.vis_processor = vis_processor
        self.text_processor = text_processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Reads and processes one pair; raises SkipSample if its file is missing or damaged."""
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
    def first_file(self) -> str:
        """The first image, for messages."""
        return str(self.pairs[0].image)

    @property
    def num_parts(self) -> int:
        """The number of files of a feature cache."""
        return -(-len(self) // self.PAIRS_PER_PART)

    def iter_part(self, part: int, skipped: Counter) -> Iterator[Callable[[], Sample]]:
        """Functions that read and process one sample of a part each."""
        for index in range(part * self.PAIRS_PER_PART, min(len(self), (part + 1) * self.PAIRS_PER_PART)):
            yield partial(self.__getitem__, index)

    def identity(self) -> list[Any]:
        """What the features and texts in a cache depend on: files with sizes and times, and texts."""
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

"""Image files and their texts from a list: cc_sbu_align and own images."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.errors import UserError
from minigpt4.common.images import read_plain_file
from minigpt4.common.utils import IMAGE_PLACEHOLDER, parse_json
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


@dataclass(eq=False)
class PairDataset(Dataset):
    """Image files and their captions.

    Args:
        name: of the data set, for messages.
        pairs: all of them.
        vis_processor: from an RGB image to float32 [3, S, S].
        text_processor: from caption to caption.
    """

    name: str
    pairs: list[Pair]
    vis_processor: ImageProcessor
    text_processor: TextProcessor = str
    collater = staticmethod(collate)
    drop_last = False  # every pair is used in each pass
    PAIRS_PER_PART = 1024  # in one file of a feature cache

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Reads and processes one pair; raises SkipSample if its file is missing or damaged."""
        pair = self.pairs[index]
        caption = self.text_processor(check_caption(pair.caption))
        try:
            data = read_plain_file(pair.image)
        except FileNotFoundError as error:
            raise SkipSample("missing image file") from error
        except OSError as error:
            raise SkipSample("unreadable image") from error
        image = prepare_image(data, self.vis_processor)
        return {"image": image, "text_input": caption, "instruction": pair.instruction}

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
        first = part * self.PAIRS_PER_PART
        return (partial(self.__getitem__, i) for i in range(first, min(len(self), first + self.PAIRS_PER_PART)))

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
        raise UserError(f"{key}: {folder} has no filter_cap.json; expected it beside a folder image/ of ID.jpg files.")
    content = parse_json(file.read_bytes(), f"{key}: {file}")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not annotations:
        expected = '{"annotations": [{"image_id", "caption"}, …]}'
        raise UserError(f"{key}: {file} has no annotations; expected {expected}.")
    pairs = []
    for i, entry in enumerate(annotations):
        if not isinstance(entry, dict) or not entry.keys() >= {"image_id", "caption"}:
            raise UserError(f"{key}: annotation {i} of {file} is {str(entry)[:80]}; expected image_id and caption.")
        image_id = str(entry["image_id"])
        if "/" in image_id or "\\" in image_id or image_id in ("", ".", ".."):
            raise UserError(
                f"{key}: image_id of annotation {i} of {file} is '{image_id[:80]}'; expected the name of a file in "
                "image/ without its .jpg."
            )
        pairs.append(Pair(folder / "image" / f"{image_id}.jpg", entry["caption"]))
    return pairs


def read_pairs(path: Path, key: str) -> list[Pair]:
    """Reads own images: a JSONL file of {"image", "caption"[, "instruction"]} with paths relative to it, a
    folder with one such file, or a folder of images each beside a .txt of the same name.

    Raises:
        UserError: nothing is found, or a row is of another form.
    """
    lists = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if len(lists) > 1:
        names = ", ".join(file.name for file in lists)
        raise UserError(f"{key}: {path} has several JSONL files ({names}); name the one that is meant.")
    if lists:
        return _read_jsonl(lists[0], key)
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_TYPES)
    texts = {image: image.with_suffix(".txt") for image in images if image.with_suffix(".txt").is_file()}
    if not texts:
        raise UserError(
            f"{key}: {path} has {len(images)} images and none has a .txt of the same name beside it; "
            "expected that, or one JSONL file."
        )
    return [Pair(image, text.read_text(encoding="utf-8", errors="replace").strip()) for image, text in texts.items()]


def _read_jsonl(file: Path, key: str) -> list[Pair]:
    pairs = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        row = parse_json(line, f"{key}: {where}")
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("image", "caption")):
            raise UserError(f"{key}: {where} is {str(row)[:80]}; expected image and caption as texts.")
        instruction = row.get("instruction")
        if not isinstance(instruction, str | None) or IMAGE_PLACEHOLDER in (instruction or ""):
            actual, expected = str(instruction)[:80], f"a text without {IMAGE_PLACEHOLDER}"
            raise UserError(f"{key}: instruction in {where} is '{actual}'; expected {expected}.")
        pairs.append(Pair(file.parent / row["image"], row["caption"], instruction))
    if not pairs:
        raise UserError(f"{key}: {file} is empty; expected a row an image.")
    return pairs

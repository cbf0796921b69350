"""Image files and their texts from a list: cc_sbu_align and own images."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.errors import UserError
from minigpt4.common.images import EXTENSIONS, read_plain_file
from minigpt4.common.utils import IMAGE_PLACEHOLDER, decode_text, parse_json, read_json_lines
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

_IMAGE_MARKS = (IMAGE_PLACEHOLDER, "<image>")  # ours, and that of LLaVA


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
    """Reads a folder as cc_sbu_align is one: filter_cap.json and image/ID.jpg, or another extension.

    Raises:
        UserError: the file is missing or of another form.
    """
    file = folder / "filter_cap.json"
    if not file.is_file():
        raise UserError(f"{key}: {folder} has no filter_cap.json; expected it beside a folder image/ of ID.jpg files.")
    content = parse_json(file.read_bytes(), f"{key}: {file}")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not annotations or _name_format(content):
        expected = '{"annotations": [{"image_id", "caption"}, …]}'
        raise UserError(f"{key}: {file} {_name_format(content) or 'has no annotations'}; expected {expected}.")
    images = sorted((folder / "image").iterdir()) if (folder / "image").is_dir() else []
    by_id = {image.stem: image for image in images if image.suffix.lower() in EXTENSIONS}
    by_id |= {image.stem: image for image in images if image.suffix == ".jpg"} | {image.name: image for image in images}
    pairs = []
    for i, entry in enumerate(annotations):
        if not isinstance(entry, dict) or not entry.keys() >= {"image_id", "caption"}:
            raise UserError(f"{key}: annotation {i} of {file} is {str(entry)[:80]}; expected image_id and caption.")
        image_id = str(entry["image_id"]).replace("\\", "/").removeprefix("image/")
        if "/" in image_id or image_id in ("", ".", ".."):
            raise UserError(
                f"{key}: image_id of annotation {i} of {file} is '{entry['image_id']!s:.80}'; expected the name of a "
                "file in image/, with or without its extension."
            )
        pairs.append(Pair(by_id.get(image_id, folder / "image" / f"{image_id}.jpg"), entry["caption"]))
    return pairs


def read_pairs(path: Path, key: str) -> list[Pair]:
    """Reads own images: a JSONL file of {"image", "caption"[, "instruction"]} with paths relative to it, a
    folder with one such file, or a folder of images each beside a .txt of the same name.

    Raises:
        UserError: nothing is found, or a row is of another form.
    """
    if path.is_file():
        return _read_rows(path, key)
    lists, files = sorted(path.glob("*.jsonl")), _find_files(path)
    images = [file for file in files if file.suffix.lower() in EXTENSIONS]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    found = {image: texts.get(image.with_suffix("")) or texts.get(image) for image in images}
    chosen = [file for file in lists if _is_list(file)]
    if chosen or any(found.values()):
        for file in set(lists) - set(chosen):
            logging.warning("%s: %s has no rows of image and caption; it is ignored.", key, file)
        lists = chosen
    if len(lists) > 1:
        names = ", ".join(file.name for file in lists)
        raise UserError(f"{key}: {path} has several JSONL files ({names}); name the one that is meant.")
    if lists:
        return _read_rows(lists[0], key)
    if not any(found.values()):
        other = next((f"; {file} {text}" for file in files if (text := _name_file(file))), "")
        raise UserError(
            f"{key}: {path} has {len(images)} images and none has a .txt of the same name beside it{other}; "
            "expected that, or one JSONL file, see dataset/README_OWN_DATA.md."
        )
    if without := [image for image, text in found.items() if text is None]:
        counts = len(without), len(images), without[0]
        logging.warning("%s: %d of %d images have no .txt of the same name and are ignored (first: %s).", key, *counts)
    pairs, unreadable = [], []
    for image, text in found.items():
        try:
            pairs += [Pair(image, decode_text(text.read_bytes(), str(text)).strip())] if text else []
        except (UserError, OSError) as error:
            unreadable.append(str(error))
    if not pairs:
        raise UserError(f"{key}: {unreadable[0]}")
    if unreadable:
        logging.warning("%s: %d texts are ignored, the first: %s", key, len(unreadable), unreadable[0])
    return pairs


def check_images(pairs: list[Pair], key: str) -> None:
    """Warns of pairs without an image file, among at most 1,000 of them; raises UserError if none has one."""
    drawn = pairs[:: -(-len(pairs) // 1000)]
    if missing := [pair.image for pair in drawn if not os.path.isfile(pair.image)]:
        text = f"{key}: {len(missing)} of {len(drawn)} images that were looked for are missing (first: {missing[0]})"
        if len(missing) == len(drawn):
            raise UserError(f"{text}; correct the paths.")
        logging.warning("%s; they are skipped.", text)


def _find_files(folder: Path) -> list[Path]:
    """All files below a folder; linked folders are followed, each once."""
    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=logging.warning, followlinks=True):
        targets = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name, target in targets.items() if target not in seen and not seen.add(target)]
        files += [Path(parent, name) for name in names]
    return sorted(files)


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
    return b'"image"' in first and b'"caption"' in first


def _name_format(content: Any) -> str:
    """What a JSON value is, if it is an annotation file of another project; else an empty text."""
    first = content[0] if isinstance(content, list) and content else content
    keys = first.keys() if isinstance(first, dict) else set()
    if {"images", "annotations"} <= keys:
        return "is in the format of COCO"
    if keys & {"conversations", "messages"}:
        return f"is in the format of {'LLaVA' if 'image' in keys else 'ShareGPT'}"
    return ""


def _name_file(file: Path) -> str:
    if file.suffix == ".parquet":
        return "is a Parquet file"
    if file.name == "filter_cap.json":
        return "belongs to the data set cc_sbu_align"
    try:
        return _name_format(parse_json(file.read_bytes(), "")) if file.suffix == ".json" else ""
    except UserError:
        return ""


def _read_rows(file: Path, key: str) -> list[Pair]:
    if other := _name_file(file):
        raise UserError(f"{key}: {file} {other}; expected JSONL rows of image and caption.")
    pairs = []
    for where, row in read_json_lines(file, key):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("image", "caption")):
            actual = _name_format(row) or f"is {str(row)[:80]}"
            raise UserError(f"{where} {actual}; expected image and caption as texts.")
        image, instruction = row["image"], row.get("instruction")
        if "://" in image or image.startswith("data:"):
            raise UserError(f"{where} has the image '{image[:80]}'; expected a file: download it first.")
        if not isinstance(instruction, str | None) or any(mark in (instruction or "") for mark in _IMAGE_MARKS):
            raise UserError(
                f"{where} has the instruction '{str(instruction)[:80]}'; expected a text without "
                f"{' and '.join(_IMAGE_MARKS)}, as the image always comes first."
            )
        if "\\" in image and not os.path.isfile(file.parent / image):  # as Windows writes paths
            image = image.replace("\\", "/")
        pairs.append(Pair(file.parent / image, row["caption"], instruction))
    if not pairs:
        raise UserError(f"{key}: {file} is empty; expected a row an image.")
    return pairs

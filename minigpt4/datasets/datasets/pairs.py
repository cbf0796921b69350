"""Image files and their texts from a list: cc_sbu_align and own images."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.errors import UserError
from minigpt4.common.images import EXTENSIONS
from minigpt4.common.utils import decode_text, parse_json
from minigpt4.datasets.datasets.conversations import Pair, read_source, source_identity
from minigpt4.datasets.datasets.lists import Row, is_list, name_format, read_list
from minigpt4.datasets.datasets.sample import (
    ImageProcessor,
    Sample,
    TextProcessor,
    check_caption,
    collate,
    prepare_image,
)
from minigpt4.datasets.datasets.tables import find_tables, read_table


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
        image = prepare_image(read_source(pair.image), self.vis_processor)
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
        return [[*source_identity(pair.image), pair.caption, pair.instruction] for pair in self.pairs]


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
    if not isinstance(annotations, list) or not annotations or name_format(content):
        expected = '{"annotations": [{"image_id", "caption"}, …]}'
        raise UserError(f"{key}: {file} {name_format(content) or 'has no annotations'}; expected {expected}.")
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


def read_pairs(path: Path, key: str, image_root: Path | None = None) -> list[Row]:
    """Reads own images and conversations: a file that ``read_list`` reads, a folder with one such file, a folder of
    tables, or a folder of images each beside a .txt of the same name. Paths are relative to ``image_root``, by default
    to the folder of the list.

    Raises:
        UserError: nothing is found, or a row is of another form.
    """
    if path.is_file():
        return read_list(path, key, image_root)
    lists, files = sorted(path.glob("*.jsonl")), _find_files(path)
    images = [file for file in files if file.suffix.lower() in EXTENSIONS]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    found = {image: texts.get(image.with_suffix("")) or texts.get(image) for image in images}
    if not any(found.values()) and (found_tables := find_tables(path, key)):  # img2dataset writes both: images count
        return list(read_table(found_tables, key, image_root or path))
    others = [file for kind in ("*.json", "*.csv") for file in sorted(path.glob(kind))]
    chosen = [file for file in (*lists, *others) if is_list(file)]
    if chosen or any(found.values()):
        for file in set(lists) - set(chosen):
            logging.warning("%s: %s has no rows of image and caption; it is ignored.", key, file)
        lists = chosen
    if len(lists) > 1:
        names = ", ".join(file.name for file in lists)
        raise UserError(f"{key}: {path} has several lists ({names}); name the one that is meant.")
    if lists:
        return read_list(lists[0], key, image_root)
    if not any(found.values()):
        other = next((f" {file} {text}." for file in files if (text := _name_file(file))), "")
        raise UserError(
            f"{key}: {path} has {len(images)} images and none has a .txt of the same name beside it; expected that, or "
            f"one list of them, see dataset/README_OWN_DATA.md.{other}"
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


def check_images(rows: Sequence[Row], key: str) -> None:
    """Warns of rows without an image file, among at most 1,000 of them; raises UserError if none has one."""
    drawn = [image for row in rows[:: -(-len(rows) // 1000)] for image in row.images if isinstance(image, Path)]
    if missing := [image for image in drawn if not os.path.isfile(image)]:
        text = f"{key}: {len(missing)} of {len(drawn)} images that were looked for are missing (first: {missing[0]})"
        if len(missing) == len(drawn):
            raise UserError(
                f"{text}; correct the paths, or set build_info.image_root to the folder that they begin in."
            )
        logging.warning("%s; they are skipped.", text)


def _find_files(folder: Path) -> list[Path]:
    """All files below a folder; linked folders are followed, each once."""
    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=logging.warning, followlinks=True):
        targets = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name, target in targets.items() if target not in seen and not seen.add(target)]
        files += [Path(parent, name) for name in names]
    return sorted(files)


def _name_file(file: Path) -> str:
    if file.suffix == ".parquet":
        return "is a Parquet file"
    if file.name == "filter_cap.json":
        return "belongs to the data set cc_sbu_align"
    if file.suffix in (".jsonl", ".json", ".csv") and is_list(file):
        return "is a list, which may be named in place of the folder"
    return "has no columns of images and captions" if file.name == "metadata.csv" else ""

"""Captions of images: of COCO and NoCaps, and of data sets for training."""

import atexit
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.evaluation.items import BenchmarkConfig, Item, fields_of, image_path, read_json_rows

if TYPE_CHECKING:
    from minigpt4.datasets.datasets.conversations import Pair

CAPTION_QUESTION = "Describe this image in detail."  # of captions without a question of their own


def read_captions(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """Captions in COCO's layout, which NoCaps has, too, or the list of Karpathy's split with COCO's files."""
    path = Path(section.eval_file_path or "")
    content = read_json_rows(path, where)
    if isinstance(content, list):
        names = ("image", "caption")
        rows = [fields_of(row, names, f"{where}: row {number + 1} of {path}") for number, row in enumerate(content)]
        pairs = [(re.sub(r".*COCO_\w+_0*(\d+)\.jpg", r"\1", str(image)), image, captions) for image, captions in rows]
    else:
        images, annotations = fields_of(content, ("images", "annotations"), f"{where}: {path}")
        captions: dict[str, list[str]] = {}
        for row in annotations:
            image_id, caption = fields_of(row, ("image_id", "caption"), f"{where}: an annotation in {path}")
            captions.setdefault(str(image_id), []).append(caption)
        names = [(str(row["id"]), row.get("file_name") or f"{row['id']}.jpg") for row in images]
        pairs = [(name, image, captions.get(name, [])) for name, image in names]
    if lonely := [name for name, _, captions in pairs if not captions]:
        raise UserError(f"{where}: image {lonely[0]} in {path} has no caption; give the file of one split.")
    items = [
        Item(name, image_path(section, image), "", {"captions": [captions] if isinstance(captions, str) else captions})
        for name, image, captions in pairs
    ]
    return {path.stem: items}


def read_caption_loss(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """Images and texts in any form that a training reads; each text is the only candidate.

    A conversation has one question and answer, and one image. Images of shards and of tables are written to files that
    are deleted at the end of the process.
    """
    from minigpt4.datasets.datasets.conversations import Pair, read_source
    from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs

    path = Path(section.eval_file_path or "")
    root = Path(section.img_path) if section.img_path else None
    folder = Path(tempfile.mkdtemp(prefix="minigpt4-images-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if path.suffix == ".tar":
        rows = _read_shards(str(path), where, folder, section.max_images)
    else:
        is_align = (path / "filter_cap.json").is_file()
        rows = read_align_folder(path, where) if is_align else read_pairs(path, where, root)
    items = []
    for number, row in enumerate(rows):
        turns = [(row.instruction or CAPTION_QUESTION, row.caption)] if isinstance(row, Pair) else row.turns
        if len(turns) != 1 or len(row.images) != 1:
            raise UserError(f"{where}: row {number + 1} of {path} has not one image and one text; leave such rows out.")
        ((question, text),), (image,) = turns, row.images
        if not isinstance(image, Path):
            file = folder / str(number)
            file.write_bytes(read_source(image))
            image = file
        question = question.replace(f"<Img>{IMAGE_PLACEHOLDER}</Img>", "").replace(IMAGE_PLACEHOLDER, "").strip()
        items.append(Item(str(number), str(image), question, {}, (text,)))
    return {path.stem: items}


def _read_shards(storage: str, where: str, folder: Path, max_images: int | None) -> Iterator["Pair"]:
    """The usable samples of shards in order, their images in lossless files."""
    from minigpt4.datasets.datasets.conversations import Pair
    from minigpt4.datasets.datasets.sample import WorkerInfo
    from minigpt4.datasets.datasets.shard_urls import expand_shards
    from minigpt4.datasets.datasets.shards import ShardDataset

    dataset = ShardDataset(where, expand_shards(storage, where), lambda image: image)
    skipped: Counter[str] = Counter()
    for number, sample in enumerate(islice(dataset.iter_eval(WorkerInfo(0), skipped), max_images)):
        file = folder / f"{number}.png"
        sample["image"].save(file)
        yield Pair(file, sample["text_input"])
    if skipped:
        logging.warning("%s: %d samples were left out (%s).", where, skipped.total(), ", ".join(skipped))

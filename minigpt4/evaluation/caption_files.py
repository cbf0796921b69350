"""Captions of images: of COCO and NoCaps, and of data sets for training."""

import re
from pathlib import Path

from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.evaluation.items import BenchmarkConfig, Item, fields_of, image_path, read_json_rows

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
    """Images and texts in any form that a training reads from files; each text is the only candidate.

    A conversation has one question and answer, and one image.
    """
    from minigpt4.datasets.datasets.conversations import Pair
    from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs

    path = Path(section.eval_file_path or "")
    root = Path(section.img_path) if section.img_path else None
    is_align = (path / "filter_cap.json").is_file()
    pairs = read_align_folder(path, where) if is_align else read_pairs(path, where, root)
    items = []
    for number, pair in enumerate(pairs):
        is_pair, image = isinstance(pair, Pair), pair.images[0] if len(pair.images) == 1 else None
        turns = [(pair.instruction or CAPTION_QUESTION, pair.caption)] if is_pair else pair.turns
        if len(turns) != 1 or not isinstance(image, str | Path):
            problem = "has not one image in a file of its own and one text"
            raise UserError(f"{where}: row {number + 1} of {path} {problem}; leave such rows out.")
        ((question, text),) = turns
        question = question.replace(f"<Img>{IMAGE_PLACEHOLDER}</Img>", "").replace(IMAGE_PLACEHOLDER, "").strip()
        items.append(Item(str(number), str(image), question, {}, (text,)))
    return {path.stem: items}

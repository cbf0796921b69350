"""Published annotation files of the data sets of MiniGPT-v2, read into rows of question and answer.

Each reader takes a parsed file, or a folder, and checks what it takes from it: a file of another data set is refused.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common import pickles
from minigpt4.common.boxes import box_to_text
from minigpt4.common.errors import UserError
from minigpt4.common.utils import parse_json
from minigpt4.datasets.datasets.sample import file_identity

MAX_REGION_AREA = 128 * 128  # pixels; larger regions of Visual Genome are not used, as in OFA
_SEE = "see dataset/README_MINIGPT_V2.md"
_TYPES = {str: "text", list: "list", dict: "object", int: "number", float: "number", type(None): "null"}
Text = str | tuple[str, ...] | Mapping[str, int]  # one text, some of which one is drawn, or the same with their counts


class Row(NamedTuple):
    """A question and its answer; of a conversation, all questions and all answers.

    ``images`` are the names under which the image may be found, the first one first; none for a text without image.
    """

    images: tuple[str, ...]
    question: Text
    answer: Text
    image_id: Any = None
    question_id: Any = None


def read_file(path: Path, key: str) -> Any:
    """The content of a JSON file; UserError if it is none."""
    return parse_json(path.read_bytes(), f"{key}: {path}")


def entries(content: Any, where: str, **fields: Any) -> Iterator[Mapping[str, Any]]:
    """The entries of a list of objects, each of which has to have fields of these types.

    Raises:
        UserError: it is no such list.
    """
    expected = ", ".join(f"{name} ({_name(kind)})" for name, kind in fields.items())
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} holds {_describe(content)}; expected a list of objects with {expected}, {_SEE}.")
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in fields.items()):
            raise UserError(f"{where}: entry {number} has {_describe(entry)}; expected {expected}, {_SEE}.")
        yield entry


def _field(content: Any, name: str, kind: Any, where: str) -> Any:
    """A field of an object of which a file consists."""
    if not isinstance(content, dict) or not isinstance(content.get(name), kind):
        raise UserError(f"{where} has {_describe(content)}; expected {name} ({_name(kind)}), {_SEE}.")
    return content[name]


def _name(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys(_TYPES[one] for one in kinds))


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{name} ({_TYPES.get(type(field), 'value')})" for name, field in list(value.items())[:8])
        return ", ".join(parts) or "no fields"
    return f"a list of {len(value)}" if isinstance(value, list) else f"the value {value!r:.80}"


def coco_names(image: str) -> tuple[str, ...]:
    """The names under which users keep an image of COCO: by itself, in the folder of its split, as it is listed."""
    name = image.rsplit("/", 1)[-1]
    split = name.split("_")[1:2] if name.startswith("COCO_") else []
    return tuple(dict.fromkeys((name, *(f"{folder}/{name}" for folder in split), image)))


def _named(image_id: int | str) -> tuple[str, ...]:
    return f"{image_id}.jpg", str(image_id)  # the latter in files of one's own


def _texts(values: Any, where: str, number: int) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: entry {number} has {values!r:.80}; expected a list of texts, {_SEE}.")
    return values


# LLaVA

_PERSON, _ASSISTANT = ("human", "user", "system"), ("gpt", "assistant", "system")


def llava(content: Any, where: str) -> Iterator[Row]:
    """Conversations of LLaVA: all questions and answers. Line ends and the image's mark leave the first question.

    Those whose turns are not by a person and the assistant in turn are left out; a warning counts them.
    """
    found, others = entries(content, where, id=(str, int), conversations=list), []
    for number, entry in enumerate(found, 1):
        speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in entry["conversations"]]
        if any(speaker in (_ASSISTANT, _PERSON)[i % 2] for i, speaker in enumerate(speakers)):
            others.append(number)
            continue
        turns = [turn.get("value") if isinstance(turn, dict) else None for turn in entry["conversations"]]
        turns = _texts(turns[: len(turns) // 2 * 2], where, number)  # a last question without answer is left out
        first = turns[0].replace("<image>", "").replace("\n", "").strip()
        names = coco_names(f"COCO_train2014_{entry['id']!s:0>12}.jpg")
        if isinstance(entry.get("image"), str):
            names += (entry["image"],)
        yield Row(names, (first, *turns[2::2]), tuple(turns[1::2]), entry["id"])
    if others:
        problem = "begin with an answer or a system text, or have two turns of one side"
        advice = "they are left out. The data set image_text reads such files"
        logging.warning("%s: %d conversations %s (entry %d); %s.", where, len(others), problem, others[0], advice)


def llava_first_turn(content: Any, where: str) -> Iterator[Row]:
    """The first question and answer of each conversation."""
    for row in llava(content, where):
        yield row._replace(question=row.question[0], answer=row.answer[0])


def unnatural_instructions(content: Any, where: str) -> Iterator[Row]:
    """Instructions without image: the first instance of each, with its constraints."""
    for number, entry in enumerate(entries(content, where, instances=list), 1):
        kinds = {"instruction_with_input": str, "output": str, "constraints": (str, type(None))}
        (instance,) = entries(entry["instances"][:1], f"{where}: entry {number}: instances", **kinds)
        parts = instance["instruction_with_input"], instance.get("constraints")
        yield Row((), " ".join(part for part in parts if part is not None), instance["output"])


# boxes


def refcoco(folder: Path, key: str, dataset: str, split_by: str) -> Iterator[Row]:
    """Expressions (of which one is drawn) and the box that they refer to: the split ``train`` of RefCOCO, + or g."""
    folder = folder / dataset.removeprefix("inv")
    file, instances = folder / f"refs({split_by}).p", folder / "instances.json"
    for path in (file, instances):
        if not path.is_file():
            raise UserError(f"{key}: there is no {path}; expected it with build_info.dataset and splitBy, {_SEE}.")
    try:
        yield from _read_refcoco(file, instances, str([file_identity(file), file_identity(instances)]))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


@lru_cache(maxsize=3)  # the inverse data sets read the same files, which takes seconds
def _read_refcoco(file: Path, instances: Path, identity: str) -> tuple[Row, ...]:
    """The rows of ``refcoco``; ``identity`` changes with the files."""
    try:
        refs = pickles.load_plain(file)
    except Exception as error:  # a damaged pickle raises many kinds
        cause = str(error) or type(error).__name__
        raise UserError(f"{file} is refused: {cause}; download the file of refer again, {_SEE}.") from error
    content = parse_json(instances.read_bytes(), str(instances))
    images = entries(
        _field(content, "images", list, str(instances)), f"{instances}: images", id=int, width=int, height=int
    )
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    found = entries(
        _field(content, "annotations", list, str(instances)), f"{instances}: annotations", id=int, bbox=list
    )
    boxes = {entry["id"]: entry["bbox"] for entry in found}
    kinds, rows = {"image_id": int, "ann_id": int, "split": str, "sentences": list}, []
    for number, ref in enumerate(entries(refs, str(file), **kinds), 1):
        if ref["split"] != "train":
            continue
        if ref["ann_id"] not in boxes or ref["image_id"] not in sizes:
            raise UserError(f"entry {number} of {file} is not in {instances}; copy both from one download.")
        sentences = [sentence.get("raw") for sentence in ref["sentences"] if isinstance(sentence, dict)]
        box = _box(boxes[ref["ann_id"]], sizes[ref["image_id"]], f"{instances}: annotation {ref['ann_id']}")
        names = coco_names(f"COCO_train2014_{ref['image_id']:012}.jpg")
        rows.append(Row(names, tuple(_texts(sentences, str(file), number)), box, ref["image_id"]))
    return tuple(rows)


def _box(xywh: Any, size: tuple[int, int], where: str) -> str:
    try:
        return box_to_text(xywh, *size)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where} has the box {xywh!r:.80} in an image of {size[0]}x{size[1]} pixels; expected numbers: left, "
            "top, width and height."
        ) from error


def visual_genome(folder: Path, key: str) -> Iterator[Row]:
    """Phrases of Visual Genome's smaller regions, and the boxes that they refer to."""
    files = folder / "image_data.json", folder / "region_descriptions.json"
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{key}: {folder} has no {path.name}; expected {files[0].name} and {files[1].name}, {_SEE}."
            )
    kinds = {"image_id": int, "url": str, "width": int, "height": int}
    images = {entry["image_id"]: entry for entry in entries(read_file(files[0], key), f"{key}: {files[0]}", **kinds)}
    number = (int, float)
    kinds = {"phrase": str, "x": number, "y": number, "width": number, "height": number}
    for entry in entries(read_file(files[1], key), f"{key}: {files[1]}", id=int, regions=list):
        if (image := images.get(entry["id"])) is None:
            raise UserError(f"{key}: image {entry['id']} of {files[1]} is not in {files[0]}; copy both anew.")
        where = f"{key}: {files[1]}: image {entry['id']}"
        names = ("/".join(image["url"].split("/")[-2:]),)
        for region in entries(entry["regions"], where, **kinds) if entry["regions"] else ():
            xywh = [region[name] for name in ("x", "y", "width", "height")]
            if xywh[2] * xywh[3] < MAX_REGION_AREA:
                yield Row(names, region["phrase"], _box(xywh, (image["width"], image["height"]), where), entry["id"])


def inverse(rows: Iterator[Row]) -> Iterator[Row]:
    """The same with the box as question and its expression as answer."""
    return (row._replace(question=row.answer, answer=row.question) for row in rows)


def flickr_grounded_caption(content: Any, where: str) -> Iterator[Row]:
    """Captions with the boxes of their phrases."""
    for entry in entries(content, where, image_id=(int, str), grounded_caption=str):
        yield Row(_named(entry["image_id"]), "", entry["grounded_caption"], entry["image_id"])


def flickr_caption_to_phrase(content: Any, where: str) -> Iterator[Row]:
    """Captions, and the same with the boxes of their phrases."""
    for entry in entries(content, where, image_id=(int, str), caption=str, output=str):
        yield Row(_named(entry["image_id"]), entry["caption"], entry["output"], entry["image_id"])


def flickr_object_to_phrase(content: Any, where: str) -> Iterator[Row]:
    """Phrases and their boxes."""
    for entry in entries(content, where, image_id=(int, str), phrase=str, bbox=str):
        answer = f"<p>{entry['phrase']}</p> {entry['bbox']}"
        yield Row(_named(entry["image_id"]), entry["phrase"], answer, entry["image_id"])


# captions


def coco_caption(content: Any, where: str) -> Iterator[Row]:
    """Captions of COCO in Karpathy's split, those of images of train2014."""
    for entry in entries(content, where, image=str, caption=str):
        if "train" in entry["image"]:
            yield Row(coco_names(entry["image"]), "", entry["caption"])


def textcaps(content: Any, where: str) -> Iterator[Row]:
    """Captions of TextCaps."""
    for entry in entries(_field(content, "data", list, where), where, image_id=str, caption_str=str):
        yield Row(_named(entry["image_id"]), "", entry["caption_str"])


# questions


def vqa(content: Any, where: str) -> Iterator[Row]:
    """Questions and ten answers each, as LAVIS writes VQAv2 and OK-VQA; frequent answers are drawn more often."""
    found = entries(content, where, image=str, question=str, question_id=(int, str), answer=list)
    for number, entry in enumerate(found, 1):
        answers = Counter(_texts(entry["answer"], where, number))
        yield Row(coco_names(entry["image"]), entry["question"], dict(answers), question_id=entry["question_id"])


def aok_vqa(content: Any, where: str) -> Iterator[Row]:
    """Questions and direct answers of A-OKVQA, in LAVIS's file or the original one, which has image_id only."""
    for number, entry in enumerate(entries(content, where, question=str, direct_answers=list), 1):
        names = coco_names(_aok_image(entry, where, number))
        if "image_id" in entry:
            names += tuple(f"{split}{entry['image_id']!s:0>12}.jpg" for split in ("", "COCO_val2014_"))
        yield Row(names, entry["question"], dict(Counter(_texts(entry["direct_answers"], where, number))))


def _aok_image(entry: Mapping[str, Any], where: str, number: int) -> str:
    if isinstance(entry.get("image"), str):
        return entry["image"]
    if isinstance(entry.get("image_id"), int | str):
        return f"COCO_train2014_{entry['image_id']!s:0>12}.jpg"
    raise UserError(f"{where}: entry {number} has {_describe(entry)}; expected image or image_id, {_SEE}.")


def gqa(content: Any, where: str) -> Iterator[Row]:
    """Questions and answers of GQA, as LAVIS writes them."""
    for entry in entries(content, where, image=str, question=str, answer=str):
        yield Row(coco_names(entry["image"]), entry["question"], entry["answer"])


def ocr_vqa(content: Any, where: str) -> Iterator[Row]:
    """Questions about covers of books; split 1, which is that for training."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where} holds {_describe(content)}; expected an object with an entry for each image, {_SEE}.")
    kinds = {"split": int, "imageURL": str, "questions": list, "answers": list}
    found = entries(list(content.values()), where, **kinds)
    for number, (image_id, entry) in enumerate(zip(content, found, strict=True), 1):
        if entry["split"] == 1:
            pairs = zip(
                _texts(entry["questions"], where, number), _texts(entry["answers"], where, number), strict=False
            )
            name = image_id + os.path.splitext(entry["imageURL"])[1]
            yield from (Row((name,), question, answer, image_id) for question, answer in pairs)

"""Images with instructions and answers: the data sets of MiniGPT-v2, which differ in file format and templates only."""

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.boxes import is_outside, text_boxes
from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.datasets.datasets import annotations
from minigpt4.datasets.datasets.annotations import Row, Text
from minigpt4.datasets.datasets.conversations import read_source
from minigpt4.datasets.datasets.sample import (
    ImageProcessor,
    Sample,
    SkipSample,
    TextProcessor,
    check_caption,
    collate,
    prepare_image,
)

CONNECT_SYM = "!@#"  # between the questions, and the answers, of a conversation
_IMAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img> "
_MAX_OUTSIDE = 0.01  # share of boxes outside their images above which the images must be others

_REFER = (
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)
_IDENTIFY = (
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)
_GROUND = (
    "[grounding] please describe this image in details",
    "[grounding] describe this image as detailed as possible",
    "[grounding] summarize this image in details",
    "[grounding] give a thorough description of what you see in this image",
)
_CAPTION = (
    "[caption] Briefly describe this image.",
    "[caption] Provide a concise depiction of this image.",
    "[caption] Present a short description of this image.",
    "[caption] Summarize this image in a few words.",
    "[caption] A short image caption:",
    "[caption] A short image description:",
    "[caption] A photo of ",
    "[caption] An image that shows ",
    "[caption] Write a short description for the image. ",
    "[caption] Write a description for the photo.",
    "[caption] Provide a description of what is presented in the photo.",
    "[caption] Briefly describe the content of the image.",
    "[caption] Can you briefly explain what you see in the image?",
    "[caption] Could you use a few words to describe what you perceive in the photo?",
    "[caption] Please provide a short depiction of the picture.",
    "[caption] Using language, provide a short account of the image.",
    "[caption] Use a few words to illustrate what is happening in the picture.",
)
_VQA = ("[vqa] {}", "[vqa] Based on the image, respond to this question with a short answer: {}")


@dataclass(frozen=True)
class InstructionFormat:
    """What makes a data set one of its own.

    Args:
        read: from annotations to rows, see ``annotations``.
        templates: one is drawn for each sample, and the question is formatted into it.
        cleaned: which texts pass the text processor.
        is_conversation: rows hold several questions and answers.
        has_boxes: texts of the file hold boxes.
    """

    read: Any
    templates: tuple[str, ...] = ("{}",)
    cleaned: tuple[str, ...] = ()
    is_conversation: bool = False
    has_boxes: bool = False


def _inverse_refcoco(*source: Any) -> Iterator[Row]:
    return annotations.inverse(annotations.refcoco(*source))


_REFCOCO = InstructionFormat(annotations.refcoco, _REFER, ("question",))
_INVERSE = InstructionFormat(_inverse_refcoco, _IDENTIFY, ("answer",))
_LLAVA = InstructionFormat(annotations.llava_first_turn, cleaned=("question",))
_CONVERSATION = InstructionFormat(annotations.llava, is_conversation=True)
_DETECTION = ("[detection] {}",)
FORMATS = {
    **dict.fromkeys(("refcoco", "refcocop", "refcocog"), _REFCOCO),
    **dict.fromkeys(("invrefcoco", "invrefcocop", "invrefcocog"), _INVERSE),
    "refvg": InstructionFormat(annotations.visual_genome, _REFER, ("question",)),
    "flickr_grounded_caption": InstructionFormat(annotations.flickr_grounded_caption, _GROUND, has_boxes=True),
    "flickr_CaptionToPhrase": InstructionFormat(annotations.flickr_caption_to_phrase, _DETECTION, has_boxes=True),
    "flickr_ObjectToPhrase": InstructionFormat(annotations.flickr_object_to_phrase, _DETECTION, has_boxes=True),
    **dict.fromkeys(("llava_detail", "llava_reason"), _LLAVA),
    **dict.fromkeys(("llava_conversation", "multitask_conversation"), _CONVERSATION),
    "unnatural_instruction": InstructionFormat(annotations.unnatural_instructions, cleaned=("question", "answer")),
    "coco_caption": InstructionFormat(annotations.coco_caption, _CAPTION, ("answer",)),
    "textcaps_caption": InstructionFormat(annotations.textcaps, _CAPTION, ("answer",)),
    **dict.fromkeys(("coco_vqa", "ok_vqa"), InstructionFormat(annotations.vqa, _VQA, ("question",))),
    "aok_vqa": InstructionFormat(annotations.aok_vqa, _VQA, ("question",)),
    "gqa": InstructionFormat(annotations.gqa, _VQA, ("question", "answer")),
    "ocrvqa": InstructionFormat(annotations.ocr_vqa, _VQA, ("question", "answer")),
}


@dataclass(eq=False)
class InstructionDataset(Dataset):
    """Rows of question and answer with the image's path as the only name in ``images``.

    A sample has ``image`` [3, S, S] where there is one, ``instruction_input`` and ``answer``, or of a conversation
    ``conv_q``, ``conv_a`` and ``connect_sym``, which joins its questions and its answers; ids where the set has them.
    Sentences, templates and answers are drawn by Python's random state.
    """

    name: str
    rows: list[Row]
    format: InstructionFormat
    vis_processor: ImageProcessor
    text_processor: TextProcessor
    collater = staticmethod(collate)
    drop_last = False  # every row is used in each pass

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Reads and processes one row; raises SkipSample if its image is missing or damaged, or its answer empty."""
        row, sample = self.rows[index], {}
        if row.images:
            sample["image"] = prepare_image(read_source(Path(row.images[0])), self.vis_processor)
        begin, end = (_IMAGE, " ") if row.images else ("", "")
        if self.format.is_conversation:
            if any(CONNECT_SYM in text for text in (*row.question, *row.answer)):
                raise SkipSample(f"{CONNECT_SYM} in a text")
            questions = CONNECT_SYM.join(f"{question} " for question in row.question)
            sample |= {"conv_q": begin + questions, "conv_a": check_caption(CONNECT_SYM.join(row.answer))}
            sample["connect_sym"] = CONNECT_SYM
        else:
            question, answer = self._draw("question", row.question), self._draw("answer", row.answer)
            instruction = random.choice(self.format.templates).format(question)
            sample |= {"instruction_input": begin + instruction + end, "answer": check_caption(answer)}
        ids = {"image_id": row.image_id, "question_id": row.question_id}
        return sample | {name: value for name, value in ids.items() if value is not None}

    def _draw(self, kind: str, texts: Text) -> str:
        if isinstance(texts, tuple):
            texts = random.choice(texts)
        elif not isinstance(texts, str):
            texts = random.choices(list(texts), list(texts.values()))[0]
        return self.text_processor(texts) if kind in self.format.cleaned else texts

    @property
    def first_file(self) -> str:
        """The first image, for messages."""
        return self.rows[0].images[0] if self.rows[0].images else "none"


def check_rows(rows: Iterable[Row], key: str, has_boxes: bool = False) -> list[Row]:
    """The rows that can be trained, see ``check_boxes``.

    Raises:
        UserError: a text has a mark for an image, or none has a box where there should be some.
    """
    rows = list(rows)
    if has_boxes and rows and not any(text_boxes(text) for row in rows for text in _texts_of(row)):
        first = " ".join(_texts_of(rows[0]))
        raise UserError(f"{key}: no text has a box (first: '{first:.80}'); expected {{<left><top><right><bottom>}}.")
    for row in rows:
        if any(IMAGE_PLACEHOLDER in text for text in _texts_of(row)):
            raise UserError(f"{key}: '{_texts_of(row)[0]:.80}' has {IMAGE_PLACEHOLDER} in its text; remove it.")
    return check_boxes(rows, key, _texts_of)


def _texts_of(row: Row) -> list[str]:
    return [text for part in (row.question, row.answer) for text in ((part,) if isinstance(part, str) else part)]


def check_boxes(rows: Sequence[Any], key: str, texts_of: Callable[[Any], Iterable[str]]) -> list[Any]:
    """The rows without boxes that lie outside their images; a warning counts those that are left out.

    Raises:
        UserError: more than 1 % of the boxes lie outside.
    """
    good, bad, num_boxes = [], [], 0
    for row in rows:
        boxes = [box for text in texts_of(row) for box in text_boxes(text)]
        num_boxes += len(boxes)
        (bad if any(map(is_outside, boxes)) else good).append(row)
    if bad:
        text = f"{key}: {len(bad)} of {num_boxes} boxes lie outside their image (in hundredths of its sides; first: "
        text += f"'{' '.join(texts_of(bad[0])):.120}')"
        if len(bad) > _MAX_OUTSIDE * num_boxes:
            raise UserError(f"{text}; expected 0 to 100: do the annotations belong to images of other sizes?")
        logging.warning("%s; they are left out.", text)
    return good


def find_images(rows: Iterable[Row], folder: Path, key: str) -> list[Row]:
    """The rows whose image is in a folder, with its path in place of the names; a warning counts the others.

    Raises:
        UserError: no row has an image.
    """

    @cache
    def names_in(path: str) -> frozenset[str]:
        return frozenset(os.listdir(path)) if os.path.isdir(path) else frozenset()

    @lru_cache(maxsize=1 << 16)
    def find(names: tuple[str, ...]) -> tuple[str, ...]:
        paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
        return tuple(path for path in paths if os.path.basename(path) in names_in(os.path.dirname(path)))[:1]

    found, missing = [], []
    for row in rows:
        if paths := find(row.images) if row.images else ():
            found.append(row._replace(images=paths))
        elif row.images:
            missing.append(row.images[0])
        else:
            found.append(row)
    if missing:
        text = (
            f"{key}: {len(missing)} of {len(found) + len(missing)} images are missing in {folder} (first: {missing[0]})"
        )
        if not found:
            raise UserError(f"{text}; set it to the folder of these images.")
        logging.warning("%s; their rows are left out.", text)
    return found

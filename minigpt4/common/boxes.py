"""Boxes as text in both directions, as MiniGPT-v2 writes them: ``{<x1><y1><x2><y2>}`` in hundredths of the sides.

Phrases with boxes are ``<p>phrase</p> {box}<delim>{box}``. All pixel boxes here are (left, top, right, bottom).
"""

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from PIL import Image

SCALE = 100
IOU_THRESHOLD = 0.5  # an answer is a hit above it
DRAWN_WIDTH, MAX_DRAWN_HEIGHT = 500, 2000  # pixels of an image with boxes
COLOURS = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (210, 210, 0), (255, 0, 255), (0, 255, 255), (114, 128, 250), (0, 165, 255),
    (0, 128, 0), (144, 238, 144), (238, 238, 175), (255, 191, 0), (0, 128, 0), (226, 43, 138), (255, 0, 255),
    (0, 215, 255),
)  # fmt: skip
_BOX = re.compile(r"\{<(-?\d{1,9})><(-?\d{1,9})><(-?\d{1,9})><(-?\d{1,9})>\}")
_ANSWER = re.compile(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}")
_PHRASES = re.compile(r"<p>(.*?)\}(?!<)")
_INTEGERS = re.compile(r"-?\d+")

Box = tuple[float, float, float, float]


class PhraseBox(NamedTuple):
    """A box in hundredths of the image's sides, and the phrase that it belongs to: None for an answer of one box."""

    phrase: str | None
    box: tuple[int, int, int, int]


class DrawnBox(NamedTuple):
    """A box in whole pixels with its colour (red, green, blue)."""

    box: tuple[int, int, int, int]
    colour: tuple[int, int, int]


def box_to_text(xywh: Sequence[float], width: float, height: float) -> str:
    """The text of a box (left, top, width, height) in an image of a size; truncated toward zero, not clamped."""
    left, top, box_width, box_height = xywh
    parts = left / width, top / height, (left + box_width) / width, (top + box_height) / height
    return "{{<{}><{}><{}><{}>}}".format(*(int(part * SCALE) for part in parts))


def text_boxes(text: str) -> list[tuple[int, ...]]:
    """Every box in a text, in hundredths."""
    return [tuple(map(int, match)) for match in _BOX.findall(text)]


def is_outside(box: Sequence[float]) -> bool:
    """Whether a box in hundredths has no part in the image, or its corners are swapped."""
    left, top, right, bottom = box
    return left >= SCALE or top >= SCALE or right < 0 or bottom < 0 or right < left or bottom < top


def clean_answer(answer: str) -> str:
    """An answer without "<unk>" and spaces, as benchmarks read it."""
    return answer.replace("<unk>", "").replace(" ", "").strip()


def begins_with_box(answer: str) -> bool:
    """Whether a clean answer begins with a box of numbers below 1,000."""
    return _ANSWER.match(answer) is not None


def number_box(answer: str, width: float, height: float) -> Box | None:
    """The pixel box of the four numbers in an answer, in an image of a size; None where there are more or fewer."""
    numbers = [int(number) / SCALE for number in re.findall(r"\d+", answer)]
    if len(numbers) != 4:
        return None
    left, top, right, bottom = numbers
    return left * width, top * height, right * width, bottom * height


def answer_box(answer: str, width: float, height: float) -> Box | None:
    """The pixel box of an answer to ``[refer]`` as benchmarks read it: one box at its beginning, no other number."""
    answer = clean_answer(answer)
    return number_box(answer, width, height) if begins_with_box(answer) else None


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two pixel boxes, whose sides count one pixel more, as benchmarks count them."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return (right - left + 1) * (bottom - top + 1)

    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    common = max(0, right - left + 1) * max(0, bottom - top + 1)
    union = area(*first) + area(*second) - common
    return common / union if union else 0.0  # swapped corners may leave nothing


def is_hit(found: Box | None, xywh: Sequence[float]) -> bool:
    """Whether a box that was found, if any, matches the true one (left, top, width, height), both in pixels."""
    left, top, width, height = xywh
    return found is not None and box_iou(found, (left, top, left + width, top + height)) > IOU_THRESHOLD


def phrase_texts(text: str) -> list[str]:
    """The parts of a text that begin with a phrase and end before the last brace of its boxes."""
    return _PHRASES.findall(text)


def phrase_boxes(text: str) -> list[PhraseBox]:
    """The boxes of an answer that can be drawn, with their phrases; of a text without phrases, its only four numbers.

    Text in HTML notation is read, too.
    """
    text, found = html.unescape(text), []
    parts = phrase_texts(text)
    for part in parts:
        phrase, *rest = part.split("</p>")
        numbers = [_INTEGERS.findall(box) for box in rest[0].split("<delim>")] if len(rest) == 1 else []
        found += [PhraseBox(phrase, tuple(map(int, box))) for box in numbers if len(box) == 4]
    if not parts and len(numbers := _INTEGERS.findall(text)) == 4:
        found.append(PhraseBox(None, tuple(map(int, numbers))))
    return found


def answer_boxes(text: str) -> list[PhraseBox]:
    """The boxes of an answer that have a part in the image; four numbers that are not written as a box are none."""
    if not text_boxes(text) or re.search(r"\d{10}", text):
        return []
    return [found for found in phrase_boxes(text) if not is_outside(found.box)]


def box_fields(text: str) -> list[dict[str, Any]]:
    """``answer_boxes`` as JSON: ``phrase``, or null, and ``box``, [left, top, right, bottom] in shares of the sides."""
    return [{"phrase": phrase, "box": [value / SCALE for value in box]} for phrase, box in answer_boxes(text)]


def scale_box(box: Sequence[float], width: float, height: float) -> Box:
    """A box in hundredths as a pixel box of an image of a size."""
    return tuple(value / SCALE * side for value, side in zip(box, (width, height) * 2, strict=True))


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """The size at which an image of a size is shown with boxes; tall ones are narrower."""
    if height * DRAWN_WIDTH > MAX_DRAWN_HEIGHT * width:
        return max(1, int(MAX_DRAWN_HEIGHT / height * width)), MAX_DRAWN_HEIGHT
    return DRAWN_WIDTH, max(1, int(DRAWN_WIDTH / width * height))


def drawn_boxes(text: str, width: int, height: int) -> list[DrawnBox]:
    """The boxes of an answer in an image of a size; those of one phrase have one colour, phrases take turns."""
    found = phrase_boxes(text)
    colours = _colours_of(found)
    return [DrawnBox(tuple(map(int, scale_box(box, width, height))), colours[phrase]) for phrase, box in found]


def _colours_of(found: Sequence[PhraseBox]) -> dict[str | None, tuple[int, int, int]]:
    return dict(zip(dict.fromkeys(phrase for phrase, _ in found), itertools.cycle(COLOURS)))


def coloured_html(text: str, as_drawn: bool = False) -> str:
    """The answer without boxes as HTML, with every phrase in a colour; empty where no phrase has a box.

    As in the reference each mention has the next colour, or those that have boxes the colours of these (``as_drawn``).
    What the answer itself holds of HTML is escaped.
    """
    text = html.unescape(text)
    if not phrase_texts(text) or not (found := phrase_boxes(text)):
        return ""
    colours, drawn = itertools.cycle(COLOURS), _colours_of(found)
    plain = re.sub(r"{<\d+><\d+><\d+><\d+>}|<delim>", "", text)
    parts = re.split(r"<p>(.*?)</p>", plain)  # every second part is a phrase
    for i in range(1, len(parts), 2):
        colour = drawn.get(parts[i]) if as_drawn else next(colours)
        parts[i - 1], phrase = html.escape(parts[i - 1], quote=False), html.escape(parts[i], quote=False)
        parts[i] = f'<span style="color:rgb{colour}">{phrase}</span>' if colour else phrase
    return "".join([*parts[:-1], html.escape(parts[-1], quote=False)])


def mask_to_text(mask: Image.Image | None) -> str:
    """The text of the box around what is drawn in a mask; empty where nothing is."""
    if mask is None:
        return ""
    filled = numpy.array(mask.convert("L").resize((SCALE, SCALE), Image.Resampling.NEAREST)) > 0
    if not filled.any():
        return ""
    rows, columns = (numpy.flatnonzero(filled.any(axis)) for axis in (1, 0))
    return f"{{<{columns[0]}><{rows[0]}><{columns[-1]}><{rows[-1]}>}}"


def escape_tags(text: str) -> str:
    """A text whose ``<p>`` and ``<1>`` Markdown shows as they are."""
    return text.replace("<", "\\<").replace(">", "\\>")


def unescape_tags(text: str) -> str:
    """The inverse of ``escape_tags``."""
    return text.replace("\\<", "<").replace("\\>", ">")

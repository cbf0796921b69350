"""Boxes in answers (RefCOCO/+/g), scored as the reference's evaluation does, with and without asking again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt4.common.boxes import IOU_THRESHOLD, SCALE, box_iou

NUM_FREE_ROUNDS = 5  # the answer of the fifth further round is taken whatever it says
_BEGINS_WITH_BOX = re.compile(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}")


def clean(answer: str) -> str:
    """An answer without "<unk>" and blanks."""
    return answer.replace("<unk>", "").replace(" ", "").strip()


def taken_answer(answers: Sequence[str]) -> tuple[int, str] | None:
    """Number and cleaned text of the answer that counts among the first one and those of further rounds; None: none.

    It is the first that begins with a box, or the one of the fifth further round.
    """
    for round_number, answer in enumerate(map(clean, answers)):
        if _BEGINS_WITH_BOX.match(answer) or round_number == NUM_FREE_ROUNDS:
            return round_number, answer
    return None


def is_hit(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether the box in a taken answer matches the row's ``bbox`` (left, top, width, height).

    The numbers in the whole answer count, in hundredths of the sides; where they are not exactly four, it is wrong.
    """
    numbers = [int(number) / SCALE for number in re.findall(r"\d+", answer)]
    if len(numbers) != 4:
        return False
    sides = (row["width"], row["height"]) * 2
    left, top, width, height = row["bbox"]
    try:
        iou = box_iou(
            [n * side for n, side in zip(numbers, sides, strict=True)], (left, top, left + width, top + height)
        )
    except ZeroDivisionError:  # reversed corners may leave no area
        return False
    return iou > IOU_THRESHOLD


def hits(rows: Sequence[Mapping[str, Any]], taken: Sequence[tuple[int, str] | None]) -> list[bool]:
    """Whether each row is right; one without an answer that counts is wrong.

    As in the reference, all answers about an ``img_id`` are compared with the box of its last row.
    """
    last = {row["img_id"]: row for row in rows}
    pairs = zip(rows, taken, strict=True)
    return [answer is not None and is_hit(answer[1], last[row["img_id"]]) for row, answer in pairs]


def predictions(rows: Sequence[Mapping[str, Any]], taken: Sequence[tuple[int, str] | None]) -> dict[str, list[str]]:
    """The reference's saved file: the answers that count by ``img_id``, in the order in which they were given."""
    found = [(answer[0], i, answer[1]) for i, answer in enumerate(taken) if answer is not None]
    saved: dict[str, list[str]] = {}
    for _, i, answer in sorted(found):
        saved.setdefault(rows[i]["img_id"], []).append(answer)
    return saved


def ask_again(expression: str, answer: str) -> str | None:
    """The next round's expression, in the reference a list that is printed; None where the answer counts."""
    return None if _BEGINS_WITH_BOX.match(clean(answer)) else str([expression])

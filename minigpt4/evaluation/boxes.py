"""Boxes in answers (RefCOCO/+/g), scored as the reference's evaluation does, with and without asking again."""

from collections.abc import Mapping, Sequence
from typing import Any

from minigpt4.common.boxes import begins_with_box, clean_answer, is_hit, number_box

NUM_FREE_ROUNDS = 5  # the answer of the fifth further round is taken whatever it says


def taken_answer(answers: Sequence[str]) -> tuple[int, str] | None:
    """Number and cleaned text of the answer that counts among the first one and those of further rounds; None: none.

    It is the first that begins with a box, or the one of the fifth further round.
    """
    for round_number, answer in enumerate(map(clean_answer, answers)):
        if begins_with_box(answer) or round_number == NUM_FREE_ROUNDS:
            return round_number, answer
    return None


def hits(rows: Sequence[Mapping[str, Any]], taken: Sequence[tuple[int, str] | None]) -> list[bool]:
    """Whether each row is right, of the four numbers in the whole answer; one without an answer that counts is wrong.

    As in the reference, all answers about an ``img_id`` are compared with the box of its last row.
    """
    last, right = {row["img_id"]: row for row in rows}, []
    for row, answer in zip(rows, taken, strict=True):
        true = last[row["img_id"]]
        found = number_box(answer[1], true["width"], true["height"]) if answer else None
        right.append(is_hit(found, true["bbox"]))
    return right


def predictions(rows: Sequence[Mapping[str, Any]], taken: Sequence[tuple[int, str] | None]) -> dict[str, list[str]]:
    """The reference's saved file: the answers that count by ``img_id``, in the order in which they were given."""
    found = [(answer[0], i, answer[1]) for i, answer in enumerate(taken) if answer is not None]
    saved: dict[str, list[str]] = {}
    for _, i, answer in sorted(found):
        saved.setdefault(rows[i]["img_id"], []).append(answer)
    return saved


def ask_again(expression: str, answer: str) -> str | None:
    """The next round's expression, in the reference a list that is printed; None where the answer counts."""
    return None if begins_with_box(clean_answer(answer)) else str([expression])

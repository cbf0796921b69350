"""Describes many pictures: a folder, a glob or a JSONL file in, a JSONL file out, one row a picture, in order."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.errors import UserError
from minigpt4.common.utils import parse_json
from minigpt4.conversation.conversation import IMAGE_MESSAGE, Chat
from minigpt4.conversation.generation import GenerationOptions

KINDS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass
class Question:
    """One row to come: a picture's path, as it is written out, and what to ask about it."""

    image: str
    text: str


def find_questions(source: str, question: str) -> list[Question]:
    """What to answer.

    Args:
        source: a folder (searched to its depths), a glob, a picture, or a .jsonl file of rows with ``image`` (relative
            to that file) and optionally ``question``.
        question: for rows without their own.

    Raises:
        UserError: there is nothing, or a line of the JSONL is not a row.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return list(_read_rows(path, question))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in KINDS)
    else:
        files = sorted(Path(file) for file in glob.glob(source, recursive=True))
    if not files:
        raise UserError(f"--batch: '{source}' holds no pictures ({', '.join(sorted(KINDS))}); give a folder or a glob.")
    return [Question(str(file), question) for file in files]


def _read_rows(path: Path, question: str) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 within a text
    except UnicodeDecodeError as error:
        raise UserError(f"--batch: {path} is not UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line, f"--batch: line {number} of {path}")
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise UserError(f'--batch: line {number} of {path} is no row such as {{"image": "a.jpg"}}.')
        yield Question(str(path.parent / row["image"]), str(row.get("question", question)))


def answer_batch(chat: Chat, questions: list[Question], out: Path, options: GenerationOptions, size: int = 16) -> int:
    """Answers all questions into ``out``, going on behind the rows that are there already.

    A picture that cannot be read gets a row with ``error`` in place of ``answer``. Rows are written a batch at a time.

    Returns:
        How many rows hold an error.

    Raises:
        UserError: the rows that are there are of other questions, or the file cannot be written.
    """
    try:
        done = _rows_done(out, questions)
        out.open("a").close()
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror}); give another file.") from error
    num_errors = sum("error" in row for row in done)
    with out.open("a", encoding="utf-8") as file, tqdm(total=len(questions), initial=len(done), unit="img") as bar:
        for start in range(len(done), len(questions), size):
            rows = _answer(chat, questions[start : start + size], options)
            file.write("".join(map(_line, rows)))
            file.flush()
            num_errors += sum("error" in row for row in rows)
            bar.update(len(rows))
    return num_errors


def _line(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    # The name of a file need not be UTF-8, and a question may hold half a surrogate pair: these are escaped.
    return line if line.isascii() or line.encode(errors="replace").decode() == line else json.dumps(row) + "\n"


def _rows_done(out: Path, questions: list[Question]) -> list[dict[str, Any]]:
    """The whole rows of an earlier run; half a row at the end, where it was killed, is cut away."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return []
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    mistake = UserError(f"--out: {out} holds rows of other pictures or questions; give another file or remove it.")
    try:
        rows = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
        found = [(row["image"], row["question"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise mistake from error
    if found != [(question.image, question.text) for question in questions[: len(found)]]:
        raise mistake
    if len(whole) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return rows


def _answer(chat: Chat, questions: list[Question], options: GenerationOptions) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"image": question.image, "question": question.text} for question in questions]
    ready: list[tuple[dict[str, Any], Tensor]] = []
    for row in rows:
        try:
            pixels = chat.preprocess_image(row["image"])
            conv, images = chat.template.copy(), [torch.empty(0)]  # to see whether the question is one that fits
            conv.append_message(conv.roles[0], IMAGE_MESSAGE)
            chat.ask(row["question"], conv)
            chat.check_length(conv, images, options)
        except UserError as error:
            row["error"] = str(error)
            continue
        ready.append((row, pixels))
    if ready:
        asked, pixels = zip(*ready, strict=True)
        convs, img_lists = [chat.template.copy() for _ in asked], [[] for _ in asked]
        chat.upload_batch(pixels, convs, img_lists)
        for row, conv in zip(asked, convs, strict=True):
            chat.ask(row["question"], conv)
        for row, (text, _) in zip(asked, chat.answer_batch(convs, img_lists, options), strict=True):
            row["answer"] = text
    return rows

"""Describes many images: a folder, a glob or a JSONL file in, a JSONL file out, one row per image, in order."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from minigpt4.common.errors import UserError
from minigpt4.common.images import EXTENSIONS
from minigpt4.common.utils import read_json_lines
from minigpt4.conversation.conversation import IMAGE_MESSAGE, Chat
from minigpt4.conversation.generation import GenerationOptions

Row = dict[str, str]  # "image" (a path) and "question", later "answer" or "error"


def find_questions(source: str, question: str) -> list[Row]:
    """Lists the images of a folder (recursively), a glob or a .jsonl file, in order, with their questions.

    The rows of a .jsonl file have ``image``, relative to the file, and may have a ``question`` of their own. Raises
    UserError if there are no images, or a line is not such a row.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return list(_read_rows(path, question))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    else:
        files = sorted(map(Path, glob.glob(source, recursive=True)))
    if not files:
        kinds = ", ".join(EXTENSIONS)
        raise UserError(f"--batch: '{source}' holds no images ({kinds}); give a folder or a glob.")
    return [{"image": str(file), "question": question} for file in files]


def _read_rows(path: Path, question: str) -> Iterator[Row]:
    for where, row in read_json_lines(path, "--batch"):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise UserError(f'{where} is not a row such as {{"image": "a.jpg"}}.')
        yield {"image": str(path.parent / row["image"]), "question": str(row.get("question", question))}


def answer_questions(
    chat: Chat, questions: list[Row], out: Path, options: GenerationOptions, batch_size: int = 16
) -> int:
    """Answers all questions into ``out``, after the rows that an earlier run wrote; returns how many have an error.

    A row has ``image``, ``question`` and ``answer``, or ``error`` if the image cannot be read or the question is
    refused. Raises UserError as ``read_finished``, or if ``out`` cannot be written any more; its rows are kept.
    """
    rows = read_finished(out, questions)
    size = out.stat().st_size
    with tqdm(total=len(questions), initial=len(rows), unit="img") as bar:
        for start in range(len(rows), len(questions), batch_size):
            batch = _answer(chat, questions[start : start + batch_size], options)
            size = _append(out, size, rows, batch)
            rows += batch
            bar.update(len(batch))
    return sum("error" in row for row in rows)


def read_finished(out: Path, questions: list[Row]) -> list[Row]:
    """The complete rows of an earlier run; a partial row at the end, where it was killed, is truncated.

    Creates the file if there is none. Raises UserError if it has rows of other questions, or cannot be written.
    """
    mismatch = UserError(f"--out: {out} holds rows of other images or questions; give another file or remove it.")
    with _explain_failure(out, 0):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not out.is_file():
            raise OSError("it is not a regular file")
        with out.open("ab"):
            data = out.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in complete.decode("utf-8").split("\n")[:-1]]
        actual = [{key: row[key] for key in ("image", "question")} for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise mismatch from error
    if actual != questions[: len(actual)]:
        raise mismatch
    if len(complete) < len(data):
        with _explain_failure(out, len(rows)):
            os.truncate(out, len(complete))
    return rows


def _append(out: Path, size: int, finished: list[Row], batch: list[Row]) -> int:
    """Adds a batch to a file of the finished rows and of this size; returns its new size.

    If the file has been removed, it is written again as a whole. A batch that cannot be written leaves no part of it.
    """
    with _explain_failure(out, len(finished)):
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab", buffering=0) as file:
            if (actual := file.tell()) not in (0, size):
                raise OSError(f"another program has changed it from {size} to {actual} bytes")
            rows = batch if actual else finished + batch
            # A name or a question may hold half a surrogate pair, which becomes an escape of JSON.
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            remaining = memoryview(text.encode("utf-8", errors="backslashreplace"))
            try:
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            except OSError:
                file.truncate(actual)
                raise
            return file.tell()


@contextmanager
def _explain_failure(out: Path, num_rows: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        is_kept, reason = num_rows and os.path.exists(out), getattr(error, "strerror", None) or error
        kept = f"its {num_rows} rows are kept; run the command again to continue" if is_kept else "give another file"
        raise UserError(f"--out: {out} cannot be written ({reason}); {kept}.") from error


def _answer(chat: Chat, questions: list[Row], options: GenerationOptions) -> list[Row]:
    rows, valid, convs, images = [dict(question) for question in questions], [], [], []
    for row in rows:
        try:
            if not row["question"].strip():
                raise UserError("The question is empty; write what you want to know.")
            image = chat.preprocess_image(row["image"])
            conv = chat.template.copy()
            conv.append_message(conv.roles[0], IMAGE_MESSAGE)
            chat.ask(row["question"], conv)
            chat.check_length(conv, [image], options)
        except UserError as error:
            row["error"] = str(error)
        else:
            valid.append(row)
            convs.append(conv)
            images.append(image)
    if valid:
        chat.encode_img(images)  # in one batch
        for row, (text, _) in zip(valid, chat.answer_batch(convs, [[i] for i in images], options), strict=True):
            row["answer"] = text
    return rows

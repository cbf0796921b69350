"""Answers questions about many images: a folder, a glob or a table of rows in, one row per question out, in order."""

import glob
import hashlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt4.common import device as devices
from minigpt4.common.boxes import box_fields
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.images import EXTENSIONS
from minigpt4.conversation.conversation import Answer, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve.batch_output import BatchOutput
from minigpt4.serve.engine import Engine, Request
from minigpt4.serve.tables import RESULTS, TABLES, Row, read_rows

NUM_DECODERS = 2  # threads that read images while the model works


class Question(NamedTuple):
    """A question about an image: its row of the output but for the result, the file of its image, and its text."""

    row: Row
    path: str
    text: str


def find_questions(source: str, question: str) -> list[Question]:
    """Lists the images of a folder (recursively), a glob, or a .jsonl, .csv or .parquet file, in order.

    The rows of a file have ``image``, relative to the file, and may have a ``question`` of their own. They keep all
    their fields; ``answer``, ``error`` and ``boxes`` get ``input_`` in front. Raises UserError if there are no images,
    or a line is not such a row.
    """
    path = Path(source)
    if path.suffix.lower() in (".jsonl", *TABLES) and path.is_file():
        rows = read_rows(path, "--batch")
        if not (questions := [_read_question(where, row, path.parent, question) for where, row in rows]):
            raise UserError(f"--batch: '{source}' has no rows; give a file with at least one.")
        return questions
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    else:
        files = sorted(map(Path, glob.glob(source, recursive=True)))
    if not files:
        kinds = ", ".join(EXTENSIONS)
        raise UserError(f"--batch: '{source}' holds no images ({kinds}); give a folder, a glob or a table of rows.")
    return [Question({"image": str(file), "question": question}, str(file), question) for file in files]


def _read_question(where: str, row: Any, folder: Path, default: str) -> Question:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise UserError(f'{where} is not a row such as {{"image": "a.jpg"}}.')
    for name in set(RESULTS) & set(row):
        other = f"input_{name}"
        while other in row:
            other = f"input_{other}"
        row = {other if key == name else key: value for key, value in row.items()}
    if row.get("question") is None:
        row["question"] = default
    return Question(row, str(folder / row["image"]), str(row["question"]))


def describe_settings(model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What the answers of a run depend on: the ``model`` section, the content of its checkpoint, and the flags."""
    settings = {f"model.{name}": value for name, value in model.items()}
    if ckpt := model.get("ckpt"):
        file = locate(str(ckpt), "model.ckpt")
        settings["model.ckpt"] = {"file": str(ckpt)}
        if file.is_file():
            with file.open("rb") as content:
                settings["model.ckpt"]["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
    return settings | {f"--{name.replace('_', '-')}": value for name, value in options.items()}


def answer_questions(
    chat: Chat, questions: Sequence[Question], output: BatchOutput, options: GenerationOptions, batch_size: int = 16
) -> int:
    """Answers the questions that ``output`` has no rows of; returns how many of all its rows have an error.

    Up to ``batch_size`` questions are answered together; another one follows as soon as one has its answer, while the
    images of as many more are prepared. A row has ``error`` instead of ``answer`` if its image cannot be read or its
    question is refused. Raises UserError if the output cannot be written any more; its rows are kept.
    """
    with tqdm(total=len(questions), initial=len(output), unit="img") as bar:
        for rows in stream_answers(chat, questions[len(output) :], options, batch_size):
            output.append(rows)
            bar.update(len(rows))
    return output.num_errors


def stream_answers(
    chat: Chat, questions: Sequence[Question], options: GenerationOptions, batch_size: int
) -> Iterator[list[Row]]:
    """Yields the rows of the questions in order, some at a time as they are finished.

    They have ``answer``, of MiniGPT-v2 also ``boxes``, or ``error``. Which questions share a batch, on which the last
    digits depend, is a matter of the questions and their answers alone, and not of how fast images are read.
    """
    rows: deque[tuple[Row, Future[str]]] = deque()  # in order
    places = threading.Semaphore(2 * batch_size)
    with _asking(chat, options, batch_size) as (read, ask, engine):
        images = deque(read(question.path) for question in questions[:batch_size])
        for question, following in zip_longest(questions, questions[batch_size:]):
            places.acquire()
            result = ask(question, images.popleft())
            result.add_done_callback(lambda _: places.release())
            rows.append((question.row, result))
            images += [read(following.path)] if following else []
            yield from _take_finished(rows, chat.has_boxes)
        engine.close(timeout_seconds=0)  # no more questions come, for which it would wait
        while rows:
            rows[0][1].exception()  # waits
            yield from _take_finished(rows, chat.has_boxes)


def _take_finished(rows: deque[tuple[Row, Future[str]]], has_boxes: bool) -> Iterator[list[Row]]:
    """Yields the rows at the left that are done; raises an unexpected error, such as out of memory, after them."""
    finished, failure = [], None
    while rows and rows[0][1].done() and failure is None:
        row, result = rows.popleft()
        failure = result.exception()
        if failure is None:
            answer = result.result()
            finished.append(row | {"answer": answer} | ({"boxes": box_fields(answer)} if has_boxes else {}))
        elif isinstance(failure, UserError):
            finished.append(row | {"error": str(failure)})
            failure = None
    if finished:
        yield finished
    if failure is not None:
        raise failure


@contextmanager
def _asking(
    chat: Chat, options: GenerationOptions, batch_size: int
) -> Iterator[tuple[Callable[[str], Future[Tensor]], Callable[[Question, Future[Tensor]], Future[str]], Engine]]:
    """Functions that start to read an image and to answer a question, and the engine that answers.

    At most ``2 * batch_size`` questions may be unanswered at a time.
    """
    cancelled, images = threading.Event(), OrderedDict()  # the latest images by path, which questions may share
    chat.prefixes.clear()  # answers depend on their questions alone, and not on what was asked before
    engine = Engine(chat, max_batch=batch_size, max_queue=2 * batch_size, fills_batches=True)
    decoders = ThreadPoolExecutor(NUM_DECODERS, initializer=devices.set_threads, initargs=(1,))

    def read(path: str) -> Future[Tensor]:
        images[path] = images.pop(path, None) or decoders.submit(chat.preprocess_image, path)
        if len(images) > 2 * batch_size:
            images.popitem(last=False)
        return images[path]

    def ask(question: Question, image: Future[Tensor]) -> Future[str]:
        result = Future()

        def on_update(answer: Answer | Exception) -> None:
            if result.done():  # an error of the engine is reported to its finished requests, too
                return
            if isinstance(answer, Exception):
                result.set_exception(answer)
            elif answer.finish_reason:
                result.set_result(answer.text)

        try:
            if not question.text.strip():
                raise UserError("The question is empty; write what you want to know.")
            messages = [("user", [image.result(), question.text])]
            engine.submit(Request(messages, options, on_update, timeout_seconds=inf, cancelled=cancelled))
        except Exception as error:
            result.set_exception(error)
        return result

    def has_no_traceback(record: logging.LogRecord) -> bool:
        return not record.exc_info  # the engine logs errors that end the run with a message of their own

    logging.getLogger().addFilter(has_no_traceback)
    try:
        yield read, ask, engine
    finally:  # after an error, what is still unanswered is of no use
        cancelled.set()
        decoders.shutdown(cancel_futures=True)
        engine.close()
        devices.set_threads(torch.get_num_threads())  # of threads to come
        logging.getLogger().removeFilter(has_no_traceback)

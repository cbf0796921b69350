"""Answers of a benchmark's split: a file that grows while questions are answered, and files of other programs."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError
from minigpt4.common.utils import parse_json, read_json_object
from minigpt4.evaluation.benchmarks import Given
from minigpt4.evaluation.items import ID_FIELDS, Item, Row, id_of, read_json_rows

TEXTS = ("answer", "caption", "prediction", "pred", "text", "response")  # fields of answers in other programs' files


class AnswerFile:
    """``FOLDER/NAME.jsonl``: one row for each answer, keyed by the question and the round of asking.

    Processes of one run write parts of their own, ``NAME.rankN.jsonl``, beside a ``NAME.jsonl`` that they lock; every
    process reads all of them. A partial row at the end, where a process was killed, is truncated.
    ``NAME.settings.json`` has what answers depend on.

    Raises:
        UserError: a file holds other rows, or is being written by another process.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0, world_size: int = 1) -> None:
        self._folder, self.name = folder, name
        self._settings: Mapping[str, Any] = {}
        whole, is_part = folder / f"{name}.jsonl", world_size > 1
        self._file = folder / f"{name}.rank{rank}.jsonl" if is_part else whole
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream, self._whole = self._file.open("ab+", buffering=0), whole.open("ab+")
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be written ({error.strerror}); give another folder.") from error
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_part:  # a run of one process locks it for itself; NFS lets readers share a lock
                fcntl.flock(self._whole, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(
                f"The answers to {name} in {folder} are being written by another run; wait, or give another --out."
            ) from error
        except OSError:  # a file system without locks
            pass
        self._truncate()
        self.rows = read_rows(folder, name)

    def _truncate(self) -> None:
        """Removes a partial last row."""
        self._stream.seek(0)
        data = self._stream.read()
        self._stream.truncate(data.rfind(b"\n") + 1)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError if the rows were answered with other settings; new rows are written with these."""
        self._settings = settings = json.loads(json.dumps(settings, default=str))
        written = read_settings(self._folder, self.name)
        names = [name for name, value in settings.items() if self.rows and written.get(name) != value]
        if names:
            changes = "; ".join(f"{name} was {written.get(name)!r} and is {settings[name]!r}" for name in names)
            raise UserError(f"{self._file.parent} has answers with other settings ({changes}); give another --out.")

    def check_questions(self, items: Sequence[Item]) -> None:
        """Raises UserError if a row answers another question than the item of its id, as of another annotation file."""
        for item in items:
            row, own = self.rows.get((item.id, 0), {}), question_fields(item)
            if any(row.get(name, value) != value for name, value in own.items()):
                asked = f"'{row.get('question')}' about {row.get('image')}, not '{item.question}' about {own['image']}"
                raise UserError(
                    f"{self._file.parent} has answers to other questions (question {item.id} was {asked}); "
                    "give another --out, or the same annotation file."
                )

    def append(self, rows: Sequence[Row]) -> None:
        """Writes rows to the end, the settings before the first one."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            if not self.rows:
                file = _settings_file(self._folder, self.name)
                partial = file.with_suffix(f".{os.getpid()}")  # other processes read it
                partial.write_text(json.dumps(self._settings, indent=1), encoding="utf-8")
                partial.replace(file)
            self._stream.write(data.encode("utf-8", errors="backslashreplace"))
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be written ({error.strerror}); its rows are kept: run the command again."
            ) from error
        self.rows |= {(str(row["question_id"]), int(row.get("round", 0))): row for row in rows}

    def close(self) -> None:
        """Releases the file."""
        self._stream.close()
        self._whole.close()


def question_fields(item: Item) -> Row:
    """What a row says of its question, so that it is not taken for the answer to another one."""
    return {"question_id": item.id, "image": Path(item.image).name, "question": item.question}


def read_rows(folder: Path, name: str) -> dict[tuple[str, int], Row]:
    """The rows of all parts of an ``AnswerFile``, by question and round; without a partial row at the end."""
    rows = {}
    for file in sorted({*folder.glob(f"{name}.rank*.jsonl"), folder / f"{name}.jsonl"}):
        data = file.read_bytes() if file.is_file() else b""
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            where = f"line {number} of {file}"
            row = parse_json(line, where)
            if not isinstance(row, dict) or "question_id" not in row:
                raise UserError(f"{where} is no answer; remove the file, or give another --out.")
            rows[str(row["question_id"]), int(row.get("round", 0))] = row
    return rows


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """What the rows of an ``AnswerFile`` were answered with."""
    return read_json_object(_settings_file(folder, name), "--out")


def _settings_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.settings.json"


def collect(items: Sequence[Item], rows: Mapping[tuple[str, int], Row]) -> list[Given]:
    """What was answered to each item; a missing row is a UserError."""
    given = []
    for item in items:
        if (first := rows.get((item.id, 0))) is None:
            raise UserError(f"Question {item.id} has no answer; run the command again, without --score-only.")
        texts, number, row = [], 0, first
        while row is not None:
            texts.append(str(row.get("answer", "")))
            number += 1
            row = rows.get((item.id, number))
        lists = (tuple(first.get(name, ())) for name in ("losses", "num_tokens", "target_lengths"))
        given.append(Given(tuple(texts), *lists, first.get("prompt_length", 0), "error" in first))
    return given


def read_answers(path: Path, items: Sequence[Item]) -> dict[tuple[str, int], Row]:
    """Answers that another program wrote, as rows of ``AnswerFile``.

    A list or JSON lines with one of ``ID_FIELDS`` and one of ``TEXTS``, or ``losses`` of candidates; or one object of
    answers by question. Rows without ids belong to the questions in order, if there are as many. ``image`` is an id
    only where a question has it.

    Raises:
        UserError: the file is truncated, has answers to unknown or other questions, several to one, or none to some.
    """
    where = f"--score-only: {path}"
    content = read_json_rows(path, "--score-only")
    known, rows = {item.id: item for item in items}, {}
    if isinstance(content, Mapping) and any(name in known for name in content):
        content = [{"question_id": name, "answer": text} for name, text in content.items()]
    elif isinstance(content, Mapping):
        content = [content]  # one JSON line
    if not content or not all(isinstance(row, Mapping) for row in content):
        raise UserError(f"{where} holds no rows with answers.")
    has_ids = any(
        row.get(name) is not None and (name != "image" or str(row[name]) in known)
        for row in content
        for name in ID_FIELDS
    )
    if not has_ids and len(content) != len(items):
        raise UserError(f"{where} has {len(content)} rows without ids for {len(items)} questions; add question_id.")
    for number, row in enumerate(content):
        name = str(id_of(row, where)) if has_ids else items[number].id
        key = name, int(row.get("round", 0))
        if name not in known:
            raise UserError(f"{where} answers question {name}, which the benchmark does not have.")
        if key in rows:
            raise UserError(f"{where} has two answers to question {name}; keep one.")
        asked = str(row.get("question", known[name].question))  # may be a whole prompt
        if not key[1] and known[name].question not in asked:
            problem = f"has '{asked}' as question {name}, which is '{known[name].question}'"
            raise UserError(f"{where} {problem}; give the answers to this split.")
        text = next((row[field] for field in TEXTS if field in row), "" if "losses" in row or "error" in row else None)
        if text is None:
            raise UserError(f"{where}: the row of question {name} has no answer ({', '.join(row)}).")
        rows[key] = {**row, "question_id": name, "answer": str(text)}
    if missing := [item.id for item in items if (item.id, 0) not in rows]:
        text = f"{where} has no answer to {len(missing)} of {len(items)} questions, such as {missing[0]}"
        raise UserError(f"{text}; complete it, or limit the benchmark by subset.")
    return rows

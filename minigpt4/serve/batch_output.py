"""The output of --batch: rows as JSONL, CSV or Parquet, which the next run continues after an interruption."""

import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError
from minigpt4.common.utils import read_json_object
from minigpt4.serve.tables import TABLES, Row, encode_table


class BatchOutput:
    """The rows of ``--out``, each with the answer to one question, in order.

    They are stored in ``out``, or in ``OUT.rows.jsonl`` if ``out`` is a table, which ``close`` writes from them. The
    settings that they were answered with are not fields of the rows, which would disturb joins, but in
    ``OUT.meta.json``. That file is locked until ``close`` or the end of the process. A partial row at the end, where a
    process was killed, is truncated.

    Args:
        out: a ``.jsonl``, ``.csv`` or ``.parquet`` file.
        questions: the rows without their results.
        settings: what answers depend on. In a value that is a dict, ``file`` is only a name and not compared.

    Raises:
        UserError: ``out`` has another extension, or rows of other questions or settings, is being written by another
            process, or cannot be written; or a package is missing.
    """

    def __init__(self, out: Path, questions: Sequence[Row], settings: dict[str, Any]) -> None:
        self._out, self._questions, self._settings = out, questions, settings
        self._lines: list[bytes] = []
        self._is_table = out.suffix.lower() in TABLES
        if not self._is_table and out.suffix.lower() != ".jsonl":
            raise UserError(f"--out: '{out}' is neither .jsonl nor .csv nor .parquet; give a file with such a name.")
        self._file = out.with_name(f"{out.name}.rows.jsonl") if self._is_table else out
        self._meta = out.with_name(f"{out.name}.meta.json")
        if self._is_table:
            encode_table(questions, out)  # what it cannot store is reported before anything is answered
        self._is_changed = False
        with self._explain_failure():
            if out.exists() and not out.is_file():
                raise OSError("it is not a regular file")
            self._lock = self._open_meta()
        try:
            self._read()
        except BaseException:
            with self._lock, suppress(OSError):
                if not self._meta.stat().st_size:  # the output of another program has no such file
                    self._meta.unlink()
            raise

    def _read(self) -> None:
        """Checks and counts the rows of earlier runs."""
        with self._explain_failure(), self._file.open("ab+") as file:
            file.seek(0)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        lines = complete.split(b"\n")[:-1]
        self._check_rows(lines)
        if lines:
            self._check_settings()
        elif self._is_table and self._out.exists():
            text = f"{self._out} exists, but not {self._file} with its rows"
            raise UserError(f"--out: {text}; give another file or remove it.")
        self._lines, self._size, self._is_changed = lines, len(complete), not self._out.exists()
        with self._explain_failure():
            if len(complete) < len(data):
                os.truncate(self._file, len(complete))
            if not lines:
                self._write_meta()

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_errors(self) -> int:
        """The number of rows with an ``error``."""
        return sum("error" in json.loads(line) for line in self._lines)

    def append(self, rows: Sequence[Row]) -> None:
        """Writes rows to the end; UserError if that is impossible, and then no part of them remains.

        If the file has been removed, it is written again as a whole.
        """
        lines = [_encode_row(row) for row in rows]
        with self._explain_failure():
            if not self._meta.exists():  # with its folder
                with self._lock:
                    self._lock = self._open_meta()
                self._write_meta()
            with self._file.open("ab", buffering=0) as file:
                if (actual := file.tell()) not in (0, self._size):
                    raise OSError(f"another program has changed it from {self._size} to {actual} bytes")
                _write(file, b"".join(line + b"\n" for line in (lines if actual else self._lines + lines)))
                self._size = file.tell()
        self._lines += lines
        self._is_changed = True

    def close(self) -> None:
        """Writes the table, if ``out`` is one, and releases the lock."""
        with closing(self._lock):
            if self._is_table and self._lines and self._is_changed:
                table = encode_table([json.loads(line) for line in self._lines], self._out)
                temporary = self._out.with_name(f"{self._out.name}.tmp")
                with self._explain_failure():
                    temporary.write_bytes(table)
                    temporary.replace(self._out)

    def _open_meta(self) -> io.FileIO:
        """Opens and locks the file of the settings, which it creates if there is none."""
        self._meta.parent.mkdir(parents=True, exist_ok=True)
        file = self._meta.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"--out: another process is writing {self._out}; wait until it ends, or give another file."
            ) from error
        except OSError as error:
            reason = f"{self._meta} cannot be locked ({error.strerror})"
            logging.warning("--out: %s; start no second run with this file meanwhile.", reason)
        return file

    def _write_meta(self) -> None:
        self._lock.seek(0)
        self._lock.truncate()
        _write(self._lock, (json.dumps(self._settings, indent=2) + "\n").encode())

    def _check_rows(self, lines: Sequence[bytes]) -> None:
        """Raises UserError unless the lines answer the first questions."""
        for number, line in enumerate(lines, 1):
            try:
                beginning = _encode_row(self._questions[number - 1])[:-1]
                is_own = line.startswith((beginning + b', "answer": ', beginning + b', "error": ')) and json.loads(line)
            except (IndexError, ValueError, RecursionError):
                is_own = False
            if not is_own:
                text = f"holds rows of other images or questions, from line {number} on"
                raise UserError(f"--out: {self._file} {text}; give another file or remove it.")

    def _check_settings(self) -> None:
        """Raises UserError if the rows were written with other settings."""
        written, current = read_json_object(self._meta, "--out") if self._meta.stat().st_size else {}, self._settings
        if not written and current:
            text = f"{self._meta} with the settings of its rows is missing"
            raise UserError(f"--out: {self._file} cannot be continued, as {text}; give another file or remove it.")
        names = [name for name in {**written, **current} if _content(written, name) != _content(current, name)]
        if names:
            changes = "; ".join(f"{name} was {written.get(name)!r} and is {current.get(name)!r}" for name in names)
            raise UserError(f"--out: {self._file} has rows with other settings ({changes}); give another file.")

    @contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            is_kept, reason = self._lines and os.path.exists(self._file), getattr(error, "strerror", None) or error
            kept = f"its {len(self)} rows are kept; run the command again to continue"
            raise UserError(
                f"--out: {self._out} cannot be written ({reason}); {kept if is_kept else 'give another file'}."
            ) from error


def _content(settings: dict[str, Any], name: str) -> str:
    """A setting as text that can be compared, without the name of a file."""
    value = settings.get(name)
    return json.dumps({**value, "file": None} if isinstance(value, dict) else value, sort_keys=True, default=str)


def _encode_row(row: Row) -> bytes:
    """A row as JSON; half a surrogate pair, as in a name that is not UTF-8, becomes an escape of JSON."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", errors="backslashreplace")


def _write(file: io.FileIO, data: bytes) -> None:
    """Appends all the data or, with an OSError, nothing."""
    size, remaining = file.tell(), memoryview(data)
    try:
        while remaining:
            remaining = remaining[file.write(remaining) :]
    except OSError:
        file.truncate(size)
        raise

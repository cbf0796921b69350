"""Tables of --batch: rows that are read from JSONL, CSV or Parquet, and rows as CSV or Parquet."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError
from minigpt4.common.utils import decode_text, read_json_lines

Row = dict[str, Any]  # the fields of a question, later also "answer", for some models with "boxes", or "error"
TABLES = (".csv", ".parquet")
RESULTS = ("answer", "error", "boxes")


def read_rows(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Returns (location, row) of a .jsonl, .csv or .parquet file; a UserError if it is damaged.

    ``key`` begins the messages. Cells of CSV are texts, or None if they are empty; a row of JSONL may be any value.
    """
    if path.suffix.lower() == ".csv":
        where = f"{key}: {path}"
        reader = csv.DictReader(io.StringIO(decode_text(path.read_bytes(), where), newline=""), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values() or len(row) < len(reader.fieldnames):
                    raise csv.Error(f"it has other cells than the {len(reader.fieldnames)} names of the first line")
                yield f"{key}: line {reader.line_num} of {path}", {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise UserError(f"{key}: line {reader.line_num} of {path} is not valid CSV ({error}).") from error
    elif path.suffix.lower() == ".parquet":
        pyarrow = _import_pyarrow(f"{key}: {path}")
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{key}: {path} cannot be read as Parquet ({error}).") from error
        yield from ((f"{key}: row {number} of {path}", row) for number, row in enumerate(rows, 1))
    else:
        yield from read_json_lines(path, key)


def encode_table(rows: Sequence[Row], out: Path) -> bytes:
    """All rows as CSV or Parquet, by the extension of ``out``; UserError if that is impossible.

    In CSV, values other than texts are JSON, and null is an empty cell.
    """
    names = [*dict.fromkeys(name for row in rows for name in row if name not in RESULTS), "answer", "error"]
    names += ["boxes"] if any("boxes" in row for row in rows) else []
    columns = {name: [row.get(name) for row in rows] for name in names}
    if out.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(zip(*(map(_cell, column) for column in columns.values()), strict=True))
        return text.getvalue().encode("utf-8", errors="backslashreplace")
    pyarrow, arrays = _import_pyarrow(f"--out: {out}"), {}
    for name, column in columns.items():
        try:
            # The encoded texts have "?" for half a surrogate pair, as UTF-8 has none.
            values = json.loads(json.dumps(column, ensure_ascii=False, default=str).encode("utf-8", errors="replace"))
            arrays[name] = pyarrow.array(values, pyarrow.string() if name in ("answer", "error") else None)
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            text = f"Parquet has one type for each column, and '{name}' has several ({error})"
            raise UserError(f"--out: {out} cannot be written: {text}; write .csv or .jsonl.") from error
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink)
    return sink.getvalue().to_pybytes()


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _import_pyarrow(where: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{where} needs the package pyarrow ({error}); pip install pyarrow, or use .jsonl.") from error
    return pyarrow

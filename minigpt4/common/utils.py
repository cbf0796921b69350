"""Job ids, texts and JSON."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError

IMAGE_PLACEHOLDER = "<ImageHere>"  # the image's position in a prompt; not allowed in text from users


def now() -> str:
    """Returns the current second as a job id, YYYYMMDDHHMMSS, local time."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


def decode_text(data: bytes, where: str) -> str:
    """Decodes a text of a user: UTF-8, a byte order mark is ignored; a UserError that begins with ``where`` if not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{data[error.start]:02x} in line {line}"
        raise UserError(f"{where} is not UTF-8 text ({problem}); save it as UTF-8.") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """Returns the value of a JSON text; a UserError that begins with ``where`` if it is not valid."""
    try:
        return json.loads(text if isinstance(text, str) else decode_text(text, f"{where} is no valid JSON, as it"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # a ValueError, too, for numbers of thousands of digits
        raise UserError(f"{where} is no valid JSON ({error}).") from error


def read_json_lines(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Returns (location, value) of each line that is not blank; a UserError with the location if one is invalid."""
    decode_text(file.read_bytes(), f"{key}: {file}")  # reports what is not UTF-8
    with file.open(encoding="utf-8-sig") as lines:  # one by one, as files may have gigabytes
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{key}: line {number} of {file}"
                yield where, parse_json(line, where)


def read_json_object(file: Path, key: str) -> dict[str, Any]:
    """Returns the content of a JSON file, empty where there is none; a UserError if it is damaged or no object."""
    content = parse_json(file.read_bytes(), f"{key}: {file}") if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{key}: {file} cannot be read: it holds no JSON object; copy it again.")
    return content

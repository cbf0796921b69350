"""Job ids and JSON."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError

IMAGE_PLACEHOLDER = "<ImageHere>"  # the image's position in a prompt; not allowed in text from users


def now() -> str:
    """Returns the current second as a job id, YYYYMMDDHHMMSS, local time."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


def parse_json(text: str | bytes, where: str) -> Any:
    """Returns the value of a JSON text; a UserError that begins with ``where`` if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 and numbers of thousands of digits: ValueErrors
        raise UserError(f"{where} is no valid JSON ({error}).") from error


def read_json_object(file: Path, key: str) -> dict[str, Any]:
    """Returns the content of a JSON file, empty where there is none; a UserError if it is damaged or no object."""
    content = parse_json(file.read_bytes(), f"{key}: {file}") if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{key}: {file} cannot be read: it holds no JSON object; copy it again.")
    return content

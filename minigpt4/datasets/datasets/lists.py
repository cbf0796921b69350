"""Files that list images and texts: JSON, JSONL, COCO captions, CSV, and tables. The content decides, not the name."""

import ast
import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from minigpt4.common.errors import UserError
from minigpt4.common.images import EXTENSIONS
from minigpt4.common.utils import decode_text, parse_json, read_json_lines
from minigpt4.datasets.datasets import tables
from minigpt4.datasets.datasets.conversations import Dialogue, Pair
from minigpt4.datasets.datasets.rows import Location, read_row

Row = Pair | Dialogue
_KINDS = {  # first bytes of files that are recognised and cannot be read
    b"PK\3\4": "a ZIP archive", b"\x1f\x8b": "a gzip file", b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7z archive", b"\x89HDF": "an HDF5 file", b"SQLite format 3": "an SQLite database",
    b"\x80\4": "a pickle", b"\x80\5": "a pickle", b"\x93NUMPY": "a NumPy array", b"ARROW1": "a Feather file",
    b"%PDF": "a PDF file", b"\xff\xd8\xff": "an image", b"\x89PNG": "an image", b"GIF8": "an image",
}  # fmt: skip
_EXPECTED = "expected a list or table that dataset/README_OWN_DATA.md describes"
_IMAGE_COLUMNS = ("image", "image_name", "image_path", "filename", "file_name", "filepath")
_CAPTION_COLUMNS = ("caption", "comment", "text", "raw", "title")
_SHARD = re.compile(r"pipe:|[a-z0-9]+://|.*\.tar$")


def read_list(file: Path, key: str, folder: Path | None = None) -> list[Row]:
    """The rows of a file; image paths are relative to ``folder``, by default the file's.

    Raises:
        UserError: the file is of no known kind, is empty, or a row cannot be trained.
    """
    folder = folder or file.parent
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    if kind := next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None):
        raise UserError(f"{key}: {file} is {kind}; {_EXPECTED}.")
    if file.name == "filter_cap.json":
        raise UserError(f"{key}: {file} belongs to the data set cc_sbu_align; set datasets.cc_sbu_align to its folder.")
    if tables.is_table(head):
        rows = list(tables.read_table([file], key, folder))
    elif _is_csv(head):
        rows = list(_read_csv(file, key, folder))
    else:
        rows = list(_read_json(file, key, folder))
    if not rows:
        raise UserError(f"{key}: {file} is empty; expected a row an image or conversation.")
    return rows


def is_list(file: Path) -> bool:
    """Whether a file in a folder of images may be their list."""
    if file.name == "filter_cap.json":
        return False
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    if file.suffix == ".csv":
        return _is_csv(head)
    keys = {name for name in (*_CAPTION_COLUMNS[::2], *_IMAGE_COLUMNS) if f'"{name}"'.encode() in head}
    has_pairs = ("caption" in keys and "image" in keys) or "file_name" in keys
    return has_pairs or any(word in head for word in (b'"conversations"', b'"messages"', b'"output"'))


def name_format(content: Any) -> str:
    """What a JSON value is, if it is an annotation file of another project; else an empty text."""
    first = content[0] if isinstance(content, list) and content else content
    keys = first.keys() if isinstance(first, dict) else set()
    if {"images", "annotations"} <= keys:
        return "is in the format of COCO"
    if keys & {"conversations", "messages"}:
        return f"is in the format of {'LLaVA' if 'image' in keys else 'ShareGPT'}"
    return ""


def shard_patterns(place: str, key: str) -> list[str]:
    """The shards that a storage names: itself, or the lines of a text file; none where it is no matter of shards.

    Paths in a text file are relative to its folder.
    """
    if place.startswith("pipe:") or place.endswith(".tar"):
        return [place]
    path = Path(place).expanduser()
    if path.is_dir() and any(path.glob("*.tar")):
        return [place]
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    first = next(_shard_lines(head.decode("utf-8-sig", errors="replace")), "")
    if not _SHARD.match(first) and (path.suffix != ".txt" or not first or _is_csv(head)):
        return []
    lines = list(_shard_lines(decode_text(path.read_bytes(), f"{key}: {path}")))
    if other := [line for line in lines if not _SHARD.match(line)]:
        raise UserError(
            f"{key}: {path} has the line '{other[0][:80]}'; expected a path or URL of a shard (.tar) a line."
        )
    if images := [line for line in lines if urlsplit(line).path.lower().endswith(EXTENSIONS)]:
        raise UserError(
            f"{key}: {path} lists images ('{images[0][:80]}'); download them with img2dataset, see its output."
        )
    return [line if re.match("pipe:|.*://", line) else str(path.parent / line) for line in lines]


def _shard_lines(text: str) -> Iterator[str]:
    lines = (line.strip() for line in text.splitlines())
    return (line for line in lines if line and not line.startswith("#"))


def _read_json(file: Path, key: str, folder: Path) -> Iterator[Row]:
    where, text = f"{key}: {file}", decode_text(file.read_bytes(), f"{key}: {file}").strip()
    if text[:1] not in ("[", "{", ""):
        columns = f"images ({', '.join(_IMAGE_COLUMNS)}) and of captions ({', '.join(_CAPTION_COLUMNS)})"
        begin = text[:80].partition("\n")[0]
        raise UserError(f"{where} begins with {begin!r}; expected JSON, or CSV whose header has a column of {columns}.")
    content: Any = None
    try:
        content = parse_json(text, where) if text else []
    except UserError:
        if text[0] == "[" or not text.partition("\n")[0].rstrip().endswith("}"):  # else it is JSONL
            raise
    del text  # which may be of gigabytes
    if isinstance(content, Mapping) and "annotations" in content:
        yield from _read_coco(content, file, key, folder)
    elif isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield read_row(row, Location(f"{key}: row {number} of {file}", folder))
    elif content is not None:
        yield read_row(content, Location(f"{key}: line 1 of {file}", folder))
    else:
        for location, row in read_json_lines(file, key):
            yield read_row(row, Location(location, folder))


def _read_coco(content: Mapping[str, Any], file: Path, key: str, folder: Path) -> Iterator[Row]:
    """Captions of COCO: images with id and file_name, annotations with image_id and caption."""
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found = [(names[entry["image_id"]], entry["caption"]) for entry in content["annotations"]]
    except (KeyError, TypeError) as error:
        expected = "images with id and file_name, and annotations with image_id and caption, as captions_train2017.json"
        raise UserError(
            f"{key}: {file} is in the format of COCO, but {error} is missing; expected {expected}."
        ) from None
    for number, (name, caption) in enumerate(found, 1):
        yield read_row({"image": name, "caption": caption}, Location(f"{key}: annotation {number} of {file}", folder))


def _columns(header: Sequence[str]) -> list[str | None]:
    """The names of the columns with images and with captions."""
    names = {name.strip().lower(): name for name in header if name}
    return [
        next((names[name] for name in known if name in names), None) for known in (_IMAGE_COLUMNS, _CAPTION_COLUMNS)
    ]


def _is_csv(head: bytes) -> bool:
    line = head.decode("utf-8-sig", errors="replace").lstrip().partition("\n")[0]
    is_token_file = "#" in line.partition("\t")[0] and "\t" in line
    return line[:1] not in "{[" and (is_token_file or all(_columns(line.split(_delimiter(line)))))


def _delimiter(line: str) -> str:
    return max("|\t;,", key=line.count)


def _read_csv(file: Path, key: str, folder: Path) -> Iterator[Row]:
    """Flickr30k's CSV files and those like them: a header, a row a caption; or IMAGE#NUMBER, a tab, the caption."""
    text = decode_text(file.read_bytes(), f"{key}: {file}").lstrip()
    delimiter = _delimiter(text.partition("\n")[0])
    try:
        header = next(csv.reader([text.partition("\n")[0]], delimiter=delimiter, skipinitialspace=True))
        image, caption = _columns(header)
        if is_token_file := image is None:  # no header: IMAGE#NUMBER
            header, image, caption = ["image", "caption"], "image", "caption"
            lines = _split_lines(text, "\t", 2)
            lines = [[values[0].partition("#")[0], *values[1:]] for values in lines]
        else:
            lines = _read_fields(text, delimiter, len(header))[1:]
    except csv.Error as error:
        raise UserError(f"{key}: {file} is no valid CSV file ({error}).") from error
    rows = []
    for number, values in enumerate(lines, 2 - is_token_file):
        if len(values) == len(header):
            row = dict(zip(header, (value.strip() for value in values), strict=True))
            rows.append((row.get("split", ""), (row, Location(f"{key}: row {number} of {file}", folder))))
    if num_other := sum(map(bool, lines)) - len(rows):
        logging.warning(
            "%s: %d rows of %s have not as many columns as its header; they are ignored.", key, num_other, file
        )
        if not rows:
            raise UserError(f"{key}: no row of {file} has as many columns as its header; write it again as CSV.")
    for row, where in tables.choose_split(rows, key, file):
        yield from (read_row({"image": row[image], "caption": text}, where) for text in _captions(row[caption], where))


def _read_fields(text: str, delimiter: str, num_columns: int) -> list[list[str]]:
    """The fields of all rows; where quotation marks enclose no fields, as in Flickr30k's file, they are text, and what
    follows the last separator of the header belongs to the last field."""
    is_strict = delimiter != ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=is_strict)
    try:
        rows = list(reader)
        if not is_strict or all(len(row) <= num_columns for row in rows):
            return rows
    except csv.Error:
        if not is_strict:
            raise
    return _split_lines(text, delimiter, num_columns)


def _split_lines(text: str, delimiter: str, num_columns: int) -> list[list[str]]:
    lines = (line.rstrip("\n") for line in io.StringIO(text, newline=None))
    return [line.split(delimiter, num_columns - 1) if line else [] for line in lines]


def _captions(text: str, where: Location) -> list[str]:
    """A caption, or all captions of an image as a list in JSON or in Python, as pandas writes it."""
    if not text.startswith(("['", '["')):
        return [text]
    with suppress(ValueError):
        return json.loads(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise where.error(f"has the captions {text[:80]}; expected a list in JSON") from None

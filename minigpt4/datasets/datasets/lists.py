"""Files that list images and texts: JSON, JSONL, COCO captions, CSV, and tables. The content decides, not the name."""

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def shard_patterns(place: str) -> list[str]:
    """The shards that a storage names: itself, or the lines of a text file; none where it is no matter of shards."""
    if place.startswith("pipe:") or place.endswith(".tar"):
        return [place]
    path = Path(place).expanduser()
    if path.is_dir() and any(path.glob("*.tar")):
        return [place]
    if path.suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in decode_text(path.read_bytes(), str(path)).splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if other := [
            line for line in lines if not (line.endswith(".tar") or "://" in line or line.startswith("pipe:"))
        ]:
            raise UserError(f"{path} has the line '{other[0][:80]}'; expected a path or URL of a shard (.tar) a line.")
        if images := [line for line in lines if line.lower().endswith(EXTENSIONS)]:
            raise UserError(
                f"{path} lists images ('{images[0][:80]}'); download them with img2dataset, see its output."
            )
        return lines
    return []


def _read_json(file: Path, key: str, folder: Path) -> Iterator[Row]:
    text = decode_text(file.read_bytes(), f"{key}: {file}").lstrip()
    content: Any = None
    if text.startswith("[{") or file.suffix == ".json" or (text.startswith("[") and "\n" in text.strip()):
        try:
            content = parse_json(text, f"{key}: {file}")
        except UserError:
            if not text.startswith("{"):  # else it may be JSONL
                raise
    if isinstance(content, Mapping) and "annotations" in content:
        yield from _read_coco(content, file, key, folder)
    elif isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield read_row(row, Location(f"{key}: row {number} of {file}", folder))
    else:
        for where, row in read_json_lines(file, key):
            yield read_row(row, Location(where, folder))


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
    delimiter, num_short = _delimiter(text.partition("\n")[0]), 0
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, skipinitialspace=True)
        header = next(lines)
        image, caption = _columns(header)
        if is_token_file := image is None:  # no header: IMAGE#NUMBER
            header, image, caption = ["image", "caption"], "image", "caption"
            lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
            lines = ([values[0].partition("#")[0], *values[1:]] for values in lines if values)
        elif "split" in header:
            logging.warning("%s: %s has a column split, which is ignored: all rows are used.", key, file)
        for number, values in enumerate(lines, 2 - is_token_file):
            row = dict(zip(header, values, strict=False))
            if not values or len(values) < len(header):
                num_short += bool(values)
                continue
            where, texts = Location(f"{key}: row {number} of {file}", folder), [row[caption].strip()]
            if texts[0].startswith('["'):  # all captions of an image
                texts = parse_json(texts[0], f"{where.text}: its {caption}")
            yield from (read_row({"image": row[image].strip(), "caption": text}, where) for text in texts)
    except csv.Error as error:
        raise UserError(f"{key}: {file} is no valid CSV file ({error}).") from error
    if num_short:
        logging.warning("%s: %d rows of %s have too few columns and are ignored.", key, num_short, file)

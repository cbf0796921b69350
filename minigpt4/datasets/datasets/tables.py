"""Parquet files, and folders that the package ``datasets`` saves: texts are read at once, images one by one."""

import bisect
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from minigpt4.common.errors import UserError
from minigpt4.common.images import EXTENSIONS, read_plain_file
from minigpt4.common.utils import read_json_object
from minigpt4.datasets.datasets.conversations import Dialogue, Pair
from minigpt4.datasets.datasets.rows import Location, read_row
from minigpt4.datasets.datasets.sample import SkipSample, file_identity

MAX_GROUP_BYTES = 2**29  # of images in a row group, which is read as a whole for each image
_IMAGES = (
    "images",
    "image",
    "file_name",
    *(extension[1:] for extension in EXTENSIONS),
)  # img2dataset names them by their format
_CAPTIONS = ("caption", "text", "txt")
_TEXTS = ("conversations", "messages", "instruction", "input", "output", "history", "system")
_SPLITS = {"storage": ("train",), "val_storage": ("val", "validation", "valid", "dev"), "test_storage": ("test",)}
T = TypeVar("T")


def is_table(head: bytes) -> bool:
    """Whether a file with these first bytes is Parquet, or Arrow's stream format, as ``save_to_disk`` writes it."""
    return head.startswith((b"PAR1", b"\xff\xff\xff\xff"))


@dataclass(frozen=True)
class TableImage:
    """An image in a table: of row ``row``, and with ``item`` that one of its list."""

    file: str
    column: str
    row: int
    item: int | None = None

    def read(self) -> bytes:
        """Its bytes; raises SkipSample where there are none."""
        value = _read_cell(self.file, self.column, self.row)
        value = value if self.item is None else value[self.item]
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        try:
            value = read_plain_file(Path(self.file).parent / value) if isinstance(value, str) else value
        except OSError as error:
            raise SkipSample("missing image file") from error
        if value is None:
            raise SkipSample("no image")
        return value

    def identity(self) -> list[Any]:
        """What its features depend on."""
        return [*file_identity(self.file), self.column, self.row, self.item]


def find_tables(folder: Path, key: str) -> list[Path]:
    """The files of a folder of tables; none if it is another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob("*/dataset_info.json")))
        raise UserError(f"{key}: {folder} holds several splits; name the folder of one of them: {splits}.")
    state = folder / "state.json"
    if files := read_json_object(state, key).get("_data_files"):  # others there are caches
        try:
            return [folder / file["filename"] for file in files]
        except (KeyError, TypeError) as error:
            raise UserError(f"{key}: {state} names no files; save the data set again with save_to_disk.") from error
    named = [(re.sub(r"-\d{5}-of-\d{5}.*", "", file.stem), file) for file in sorted(folder.glob("*.parquet"))]
    has_splits = any(name != file.stem for name, file in named)
    return choose_split(named, key, folder) if has_splits else [file for _, file in named]


def choose_split(items: Sequence[tuple[str, T]], key: str, where: Path) -> list[T]:
    """Of items with the names of their splits, those that a key of build_info stands for; all if there is one split.

    Raises:
        UserError: there are several splits, none of them for this key.
    """
    names, wanted = list(dict.fromkeys(name for name, _ in items)), _SPLITS.get(key.rpartition(".")[2])
    if len(names) < 2 or wanted is None:
        return [item for _, item in items]
    chosen = [item for name, item in items if name in wanted]
    if not chosen:
        expected = f"expected one named {' or '.join(wanted)}, or files that hold one split each"
        raise UserError(f"{key}: {where} has the splits {', '.join(names)}; {expected}.")
    logging.info("%s: %d of %d parts of %s, the split %s, are used.", key, len(chosen), len(items), where, wanted[0])
    return chosen


def read_table(files: Sequence[Path], key: str, folder: Path) -> Iterator[Pair | Dialogue]:
    """The rows of tables, whose images are read later.

    Raises:
        UserError: a table is damaged, or has not the columns of a known form.
    """
    for file in files:
        try:
            yield from _read_rows(file, key, folder)
        except (pyarrow.ArrowException, OSError) as error:
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: {file} cannot be read as a table ({cause}); copy it again.") from error


def _read_rows(file: Path, key: str, folder: Path) -> Iterator[Pair | Dialogue]:
    table = _open(str(file), os.getpid())
    schema = table.schema if isinstance(table, pyarrow.Table) else table.schema_arrow
    columns = [name for name in _IMAGES if name in schema.names][:1]
    captions = [name for name in _CAPTIONS if name in schema.names][:1]
    names = [name for name in _TEXTS if name in schema.names]
    has_dialogues = {"conversations", "messages"} & set(names) or {"instruction", "output"} <= set(names)
    if not has_dialogues and not (columns and captions):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)[:400]
        expected = "image (bytes, or bytes and path) with caption or text, or conversations, or messages"
        raise UserError(f"{key}: {file} has the columns {found}; expected {expected}.")
    texts = _select(table, names if has_dialogues else [*names, *captions]).to_pylist()
    images = _find_images(table, str(file), columns[0], schema, has_dialogues, key) if columns else [[]] * len(texts)
    for number, (row, own) in enumerate(zip(texts, images, strict=True)):
        where = Location(f"{key}: row {number + 1} of {file}", folder)
        if has_dialogues:
            yield read_row({**row, "images": own}, where)
            continue
        if len(own) > 1:
            raise where.error(f"has {len(own)} images and a caption; expected one image, or messages")
        values = row.pop(captions[0])
        for caption in values if isinstance(values, list) else [values]:
            yield read_row({**row, "image": own[0] if own else "", "caption": caption or ""}, where)


def _find_images(table: Any, file: str, column: str, schema: Any, is_counting: bool, key: str) -> list[list[Any]]:
    """The images of each row; paths are read, other images are left in the table."""
    kind = schema.field(column).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    inner = kind.value_type if is_list else kind
    if pyarrow.types.is_string(inner) or pyarrow.types.is_large_string(inner):
        values = _select(table, [column]).column(0).to_pylist()
        return [(value if is_list else [value]) if value else [] for value in values]
    is_struct = pyarrow.types.is_struct(inner) and inner.get_field_index("bytes") >= 0
    if not is_struct and not pyarrow.types.is_binary(inner) and not pyarrow.types.is_large_binary(inner):
        raise UserError(
            f"{key}: column {column} of {file} is of type {kind}; expected images as bytes, or bytes and path."
        )
    if is_struct and not is_list and _has_paths_only(table, column, kind):
        return [[value["path"]] for part in _count_columns(table, column) for value in part.to_pylist()]
    num_rows = table.num_rows if isinstance(table, pyarrow.Table) else table.metadata.num_rows
    if not isinstance(table, pyarrow.Table):
        _check_groups(table.metadata, file, column, key)
    if not is_list and not is_counting:
        return [[TableImage(file, column, row)] for row in range(num_rows)]
    counts: list[int] = []
    for values in _count_columns(table, column):
        lengths = pyarrow.compute.list_value_length(values) if is_list else values.is_valid()
        counts += [int(length or 0) for length in lengths.to_pylist()]
    items = (range(count) if is_list else [None] * count for count in counts)
    return [[TableImage(file, column, row, item) for item in own] for row, own in enumerate(items)]


def _has_paths_only(table: Any, column: str, kind: Any) -> bool:
    """Whether all images of a column of bytes and paths are files."""
    if pyarrow.types.is_null(kind.field("bytes").type):
        return True
    if isinstance(table, pyarrow.Table):
        return pyarrow.compute.struct_field(table.column(column), "bytes").null_count == table.num_rows
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    parts = [part for part in parts if part.path_in_schema == f"{column}.bytes"]
    return all(part.statistics is not None and part.statistics.null_count == part.num_values for part in parts)


def _check_groups(metadata: Any, file: str, column: str, key: str) -> None:
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        parts = [group.column(i) for i in range(group.num_columns)]
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column)
        if size > MAX_GROUP_BYTES:
            advice = "write it again with row groups of 100 rows (pyarrow.parquet.write_table(…, row_group_size=100))"
            raise UserError(
                f"{key}: {file} has a row group with {size:,} bytes of images, too many to read for each; {advice}."
            )


def _count_columns(table: Any, column: str) -> Iterator[Any]:
    """A column by parts, without the images' bytes where possible."""
    if isinstance(table, pyarrow.Table):
        yield table.column(column)
        return
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    paths = [path for path in paths if path.split(".")[0] == column]
    small = [path for path in paths if path.endswith(".path")] or paths
    for group in range(table.num_row_groups):
        yield table.read_row_group(group, columns=small, use_threads=False).column(0)


def _select(table: Any, names: list[str]) -> Any:
    return table.select(names) if isinstance(table, pyarrow.Table) else table.read(columns=names, use_threads=False)


@lru_cache(maxsize=64)
def _open(file: str, _pid: int) -> Any:
    """An Arrow table that is mapped into memory, or an open Parquet file; each process has its own."""
    with open(file, "rb") as stream:
        is_parquet = stream.read(4) == b"PAR1"
    return (
        pyarrow.parquet.ParquetFile(file)
        if is_parquet
        else pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()
    )


@lru_cache(maxsize=64)
def _group_ends(file: str, pid: int) -> list[int]:
    metadata = _open(file, pid).metadata
    return list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))


@lru_cache(maxsize=1)  # the images of one row group
def _read_group(file: str, pid: int, group: int, column: str) -> Any:
    return _open(file, pid).read_row_group(group, columns=[column], use_threads=False).column(0)


def _read_cell(file: str, column: str, row: int) -> Any:
    pid = os.getpid()
    if isinstance(table := _open(file, pid), pyarrow.Table):
        return table.column(column)[row].as_py()
    ends = _group_ends(file, pid)
    group = bisect.bisect_right(ends, row)
    return _read_group(file, pid, group, column)[row - (ends[group - 1] if group else 0)].as_py()

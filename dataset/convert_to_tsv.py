"""Turns BLIP's annotation files, JSON lists of {"caption", "url"}, into the TSV that img2dataset reads.

    python dataset/convert_to_tsv.py laion_synthetic_filtered_large.json laion_synthetic_filtered_large.tsv

The list is read in chunks, so memory stays at some tens of megabytes. Only the standard library is used, so that the
script also runs on its own, on the machine that downloads.
"""

import argparse
import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 22  # characters read at a time; far more than an entry has
_BETWEEN = re.compile(r"[\s,]*")


class ConversionError(ValueError):
    """The input has another form than expected; the message gives both."""


def read_list(stream: TextIO) -> Iterator[Any]:
    """Yields the entries of a JSON list one after another, holding a few chunks of it in memory.

    Raises:
        ConversionError: the text is not a list, damaged or truncated.
    """
    decoder = json.JSONDecoder()
    buffer, position = stream.read(CHUNK).lstrip("\ufeff \t\r\n"), 1
    if not buffer.startswith("["):
        raise ConversionError(f'starts with {buffer[:40]!r}; expected a JSON list: [{{"caption": …, "url": …}}, …]')
    for number in range(sys.maxsize):
        while True:
            position += len(_BETWEEN.match(buffer, position)[0])  # type: ignore[index]  # it always matches
            if buffer.startswith("]", position):
                return
            try:
                entry, position = decoder.raw_decode(buffer, position)
                break
            except json.JSONDecodeError as error:  # the entry continues in the next chunk, or is damaged
                is_damaged = len(buffer) - position > CHUNK
                more = "" if is_damaged else stream.read(CHUNK)
                if not more:
                    cause = "damaged" if is_damaged else "truncated"
                    text = buffer[position : position + 60]
                    raise ConversionError(f"is {cause} at entry {number}, {text!r}; download it again") from error
                buffer, position = buffer[position:] + more, 0
        yield entry


def convert(source: Path, target: Path) -> tuple[int, int]:
    """Writes ``caption<tab>url`` rows under a header; returns the numbers of rows and of entries without either.

    White space in a caption, including tabs and line breaks, becomes one space.

    Raises:
        ConversionError: the input is missing or of another form; then no output file remains.
    """
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    num_rows = num_empty = 0
    try:
        with (
            source.open(encoding="utf-8-sig") as stream,
            partial.open("w", encoding="utf-8", errors="replace", newline="") as output,
        ):
            writer = csv.writer(output, delimiter="\t", quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
            writer.writerow(["caption", "url"])
            for number, entry in enumerate(read_list(stream)):
                texts = [entry.get("caption"), entry.get("url")] if isinstance(entry, dict) else [None]
                row = [" ".join(text.split()) for text in texts if isinstance(text, str)]
                if len(row) != 2:
                    raise ConversionError(f"entry {number} is {str(entry)[:80]}; expected caption and url as texts")
                if not all(row):
                    num_empty += 1
                    continue
                writer.writerow(row)
                num_rows += 1
                if num_rows % 1_000_000 == 0:
                    print(f"{num_rows:,} rows", file=sys.stderr)
        if not num_rows:
            raise ConversionError("holds no entry with caption and url")
        partial.replace(target)
    except UnicodeDecodeError as error:
        raise ConversionError(f"{source}: is not UTF-8 text ({error}); download it again") from error
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from error
    except OSError as error:
        raise ConversionError(f"{error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return num_rows, num_empty


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="JSON list of {caption, url}")
    parser.add_argument("target", type=Path, help="TSV file to write")
    options = parser.parse_args(arguments)
    try:
        num_rows, num_empty = convert(options.source, options.target)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.target}: {num_rows:,} rows; {num_empty:,} entries without caption or url skipped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The results of an evaluation as one table and one JSON file."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError
from minigpt4.evaluation.benchmarks import Benchmark, Given
from minigpt4.evaluation.items import BenchmarkConfig, Item, Row

_PACKAGES = ("torch", "torchvision", "transformers", "timm", "peft", "numpy", "pillow", "nltk", "pycocoevalcap")
_COLUMNS = ("benchmark", "split", "rows", "metric", "variant", "value", "95% interval", "chance", "unparsed", "errors")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers and metrics may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def score(
    name: str,
    split: str,
    benchmark: Benchmark,
    section: BenchmarkConfig,
    items: Sequence[Item],
    given: Sequence[Given],
    num_errors: int,
) -> list[Row]:
    """A row of the table for each metric; ``unparsed`` is the share of answers without a form that can be right."""
    num_unparsed = sum(not benchmark.is_parsed(own.texts[-1]) for own in given)
    shared = {"benchmark": name, "split": split, "rows": len(items)}
    images = [item.image for item in items]
    if not section.has_labels:
        unknown = dict.fromkeys(("value", "interval", "chance"))
        row = shared | {"metric": "–", "variant": "no labels"} | unknown
        return [row | {"unparsed": num_unparsed / len(items), "errors": num_errors}]
    return [
        shared
        | {"metric": metric.name, "variant": metric.variant, "value": metric.value}
        | {"interval": metric.interval(images), "chance": metric.chance}
        | {"unparsed": (num_unparsed if metric.num_unparsed is None else metric.num_unparsed) / len(items)}
        | {"errors": num_errors}
        for metric in benchmark.score(items, given, section)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        interval = "–" if row["interval"] is None else " to ".join(map(number, row["interval"]))
        cells = [row[name] for name in _COLUMNS[:5]]
        cells += [number(row["value"]), interval, number(row["chance"]), f"{row['unparsed']:.1%}", row["errors"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_results(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Writes results.json and results.md; UserError where that is impossible."""
    content = {"results": list(rows), "settings": dict(settings), "packages": package_versions()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        (folder / "results.md").write_text(table(rows) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror}); give another folder.") from error


def write_submission(folder: Path, name: str, content: Any, form: str = "json") -> None:
    """Writes answers in the form that the benchmark's own program reads: json, or rows as jsonl or csv.

    Raises:
        UserError: the file cannot be written.
    """
    if form == "json":
        text = json.dumps(content, ensure_ascii=False)
    elif form == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    else:
        text = "".join(",".join(map(str, row)) + "\n" for row in [content[0], *(row.values() for row in content)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{form}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror}); give another folder.") from error

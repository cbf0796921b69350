"""The report of a run: curves of metrics.jsonl, drawn into one picture."""

import contextlib
import gc
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from minigpt4.common import dist_utils

NAME = "report.png"
_LOSS, _RATE, _SPEED = "loss", "learning rate", "images per second"
_MAX_PANELS = 12  # a task may return any number of metrics
_NUM_MEANS = 100  # points of the line that shows a noisy curve's course
_MAX_EPOCH_LINES = 20

Curve = tuple[list[int], list[float]]  # steps and values


def write_report(folder: Path) -> None:
    """Draws the curves of a run's ``metrics.jsonl`` into ``report.png``, which is replaced as a whole; rank 0 only.

    A panel each for the losses (of the training, of each source, of validation), the learning rates, the throughput
    and each other metric of a validation, all by global step. Whatever prevents it is logged: it must not end a run.
    """
    if not dist_utils.is_main_process():
        return
    path, partial = folder / NAME, folder / f"{NAME}.partial"
    try:
        picture = _draw(folder.name, *read_curves(folder / "metrics.jsonl"))
        gc.collect()  # matplotlib's figures refer to themselves: 50 MB until Python's own collection
        partial.write_bytes(picture)
        partial.replace(path)
    except Exception as error:  # matplotlib's own, those of its import, of the disk or of a foreign metrics.jsonl
        logging.warning("%s was not written (%s: %s); the run continues.", path, type(error).__name__, error)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_curves(path: Path) -> tuple[dict[str, dict[str, Curve]], dict[int, int]]:
    """Returns {panel: {name: curve}} of a ``metrics.jsonl``, and the first reported step of each epoch."""
    panels: dict[str, dict[str, Curve]] = {_LOSS: {}, _RATE: {}, _SPEED: {}}
    epochs: dict[int, int] = {}
    for line in _lines(path):
        step, is_training = line.pop("step"), "lr" in line
        if is_training:
            epochs.setdefault(line.get("epoch", 0), step)
        for name, value in line.items():
            panel = _training_panel(name) if is_training else _validation_panel(name, line)
            if panel and (value is None or isinstance(value, int | float)):  # None: not finite
                steps, values = panels.setdefault(panel, {}).setdefault(name, ([], []))
                steps.append(step)
                values.append(float("nan") if value is None else float(value))
    return {panel: curves for panel, curves in panels.items() if curves}, epochs


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a crash may leave half a line
                content = json.loads(line)
                if isinstance(content, dict) and isinstance(content.get("step"), int):
                    yield content


def _training_panel(name: str) -> str | None:
    for start, panel in (("loss", _LOSS), ("lr", _RATE), ("images/s", _SPEED)):
        if name.startswith(start):
            return panel
    return None


def _validation_panel(name: str, line: dict[str, Any]) -> str | None:
    split, _, metric = name.partition(" ")
    if metric == "agg_metrics" and any(other.startswith(f"{split} ") for other in line if other != name):
        return None  # selects the best checkpoint; made of the others
    return _LOSS if _LOSS in metric else metric


def _draw(title: str, panels: dict[str, dict[str, Curve]], epochs: dict[int, int]) -> bytes:
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing kept

    settings = ["default", {"text.parse_math": False}]  # names are no formulas
    with matplotlib.style.context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font does not have
        shown = list(panels.items())[:_MAX_PANELS]
        num_rows = max(1, -(-len(shown) // 2))
        height = 0.4 + 3.5 * num_rows  # in inches
        figure = Figure(figsize=(12, height))
        figure.subplots_adjust(0.07, 0.5 / height, 0.98, 1 - 0.7 / height, wspace=0.15, hspace=0.35)
        figure.suptitle(title, fontsize="medium")
        for number, (name, curves) in enumerate(shown, 1):
            axes = figure.add_subplot(num_rows, 2, number)
            _draw_panel(axes, name, curves)
            for step in list(epochs.values())[1:] if len(epochs) <= _MAX_EPOCH_LINES else ():
                axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_panel(axes: Any, panel: str, curves: dict[str, Curve]) -> None:
    for name, (steps, values) in curves.items():
        is_noisy = len(steps) > 2 * _NUM_MEANS and panel != _RATE
        marker = "o" if len(steps) < 30 else None
        (line,) = axes.plot(steps, values, marker=marker, markersize=3, linewidth=1, alpha=0.3 if is_noisy else 1)
        if is_noisy:
            parts = [numpy.array_split(numbers, _NUM_MEANS) for numbers in (steps, values)]
            means = [[numpy.nanmean(part) for part in numbers] for numbers in parts]
            (line,) = axes.plot(*means, color=line.get_color(), linewidth=1.5)
        last = next((value for value in reversed(values) if value == value), float("nan"))
        line.set_label(f"{name}: {last:.4g}")
    finite = [value for _, values in curves.values() for value in values if value == value]
    if panel == _LOSS and finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=panel, xlabel="step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", framealpha=0.5)

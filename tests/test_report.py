"""What a user sees of a training: the progress bar in a terminal, and report.png."""

import io
import json
import os
import pty
import re
import sys
import termios

import pytest
import torch
from PIL import Image
from recorded_training import run_of

from minigpt4.common.schema import RunConfig
from minigpt4.runners import report, runner_base
from minigpt4.runners.progress import EpochProgress, Tracker
from minigpt4.runners.report import read_curves, write_report


def report_epoch(folder, first=0):
    progress = EpochProgress(torch.device("cpu"), Tracker(RunConfig(), folder, {}), log_freq=1)
    with progress.run_epoch(3, 4, first):
        for i in range(first, 4):
            progress.add(i, i, torch.tensor(1.25), {}, {"text_input": ["a", "b"]}, 1e-3, 0.0)


@pytest.mark.parametrize("size", [(40, 80), (0, 0)], ids=["80 columns", "no size, as in a container"])
def test_a_terminal_has_a_bar_with_loss_rate_speed_and_time(tmp_path, monkeypatch, size):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, size)
    monkeypatch.delenv("COLUMNS", raising=False)
    with open(slave, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        report_epoch(tmp_path, first=1)
        print("the end", file=stderr, flush=True)
        data = b""
        while b"the end" not in data:
            data += os.read(master, 65536)
    shown = data.decode()
    os.close(master)
    # Steps, and elapsed and remaining time.
    assert "epoch 3 |" in shown and re.search(r"\| 4/4 \[\d\d:\d\d<\d\d:\d\d", shown), shown
    assert "loss=1.2500, lr=0.001, images/s=" in shown


def test_a_pipe_has_no_bar(tmp_path, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    report_epoch(tmp_path)
    assert "\r" not in stderr.getvalue()  # lines of the log may be there


@pytest.fixture
def train(make_runner, monkeypatch):
    """Trains the recorded batches with a report, two iterations per epoch; returns the folder."""

    def run(max_epoch):
        runner = make_runner(run_of("stage1", iters_per_epoch=2, max_epoch=max_epoch, resume="auto", log_freq=1))
        monkeypatch.setattr(runner_base, "write_report", write_report)
        runner.train()
        return runner.output_dir

    return run


def test_a_resumed_run_continues_its_curves(train):
    folder = train(1)
    first = (folder / report.NAME).read_bytes()
    assert Image.open(folder / report.NAME).size[0] == 1200
    assert train(3) == folder and (folder / report.NAME).read_bytes() != first
    panels, epochs = read_curves(folder / "metrics.jsonl")
    assert panels["loss"]["loss"][0] == panels["learning rate"]["lr"][0] == [0, 1, 2, 3, 4, 5]
    assert epochs == {0: 0, 1: 2, 2: 4}
    assert not (folder / "report.png.partial").exists()


@pytest.mark.parametrize("failure", ["no matplotlib", "broken matplotlib", "full disk", "foreign metrics"])
def test_a_report_that_fails_is_logged_and_the_run_goes_on(train, monkeypatch, caplog, failure):
    if failure == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    elif failure == "broken matplotlib":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    elif failure == "full disk":
        monkeypatch.setattr(report, "NAME", f"{'x' * 300}.png")  # an OSError, as ENOSPC is
    else:
        monkeypatch.setattr(report, "_lines", lambda _: [{"step": 0, "lr": 1.0, "loss": "low", "images/s": [1]}, {}])
    folder = train(2)
    assert (folder / "checkpoint_1.pth").exists() and not list(folder.glob("*.p*ng*"))
    (message, *others) = [record.message for record in caplog.records if "was not written" in record.message]
    assert "the run continues" in message and len(others) == 1


def test_curves_of_sources_and_validations(tmp_path):
    lines = [
        {"step": 0, "epoch": 0, "lr": 0.1, "loss": 2.0, "loss/laion": 2.5, "images/s": 5.0, "max mem": 3.0},
        {"step": 9, "val loss": 2.25, "val agg_metrics": -2.25, "val CIDEr": 0.5, "val note": "text"},
        {"step": 9, "test agg_metrics": 0.25},
        {"step": 10, "epoch": 1, "lr": 0.2, "loss": None, "loss/laion": 1.5, "images/s": 6.0, "max mem": 3.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n"text"\n{"step": "1"}\n\0\0\n{"step": 11, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    panels, epochs = read_curves(tmp_path / "metrics.jsonl")
    assert panels["loss"]["loss/laion"] == ([0, 10], [2.5, 1.5]) and panels["loss"]["val loss"] == ([9], [2.25])
    steps, values = panels["loss"]["loss"]
    assert (steps, values[0]) == ([0, 10], 2.0) and values[1] != values[1]  # a gap
    assert panels["learning rate"] == {"lr": ([0, 10], [0.1, 0.2])}
    assert panels["images per second"] == {"images/s": ([0, 10], [5.0, 6.0])}
    assert panels["CIDEr"] == {"val CIDEr": ([9], [0.5])} and panels["agg_metrics"] == {
        "test agg_metrics": ([9], [0.25])
    }
    assert len(panels) == 5 and epochs == {0: 0, 1: 10}
    folder = tmp_path / "50_$运行$"  # no formula, and no warning about its characters
    folder.mkdir()
    (tmp_path / "metrics.jsonl").rename(folder / "metrics.jsonl")
    write_report(folder)
    assert Image.open(folder / report.NAME).format == "PNG"

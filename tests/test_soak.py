"""A short soak, and whether its table finds what it is meant to; a long one: python -m tests.soak --minutes 60."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from soak_clients import judge
from soak_processes import Usage, Watched
from soak_training import compare_records, read_records

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
def test_a_short_soak(programs, tmp_path):
    command = ["-m", "tests.soak", "--minutes", "0.5", "--json", tmp_path / "soak.json"]
    done = programs.run(command, TMPDIR=str(tmp_path))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-6000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    assert all(verdict[3] for verdict in result["verdicts"]) and len(result["verdicts"]) >= 20
    assert sum(result["summary"]["restarts"].values()) >= 3 and len(result["summary"]["requests"]) >= 6


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
def test_a_short_load(programs, tmp_path):
    done = programs.run(["-m", "tests.load", "--minutes", "0.1", "--clients", "8"], TMPDIR=str(tmp_path))
    assert done.returncode == 0 and "chatting, answered" in done.stdout, f"{done.stdout}\n{done.stderr}"[-6000:]


def line(step, loss="0x1", texts="a", count=4):
    return json.dumps({"step": step, "entry": [loss, texts, count]})


def epoch(number, skipped=2):
    return json.dumps({"step": f"epoch {number}", "entry": [{"cc_sbu": {"image": skipped}}, 0.5]})


UNDISTURBED = [line(step) for step in range(6)] + [epoch(0)]


@pytest.mark.parametrize(
    ("restarted", "is_good"),
    [
        (UNDISTURBED, [True, True]),
        ([*UNDISTURBED[:4], *UNDISTURBED[2:]], [True, True]),  # steps repeated with the same samples
        ([*UNDISTURBED[:3], *UNDISTURBED[4:]], [False, True]),  # a missing step
        ([*UNDISTURBED[:3], line(3, texts="b"), *UNDISTURBED[4:]], [False, True]),  # other samples
        ([*UNDISTURBED[:3], line(3, loss="0x2"), *UNDISTURBED[3:]], [False, True]),  # another loss at first
        ([*UNDISTURBED[:6], epoch(0, skipped=3)], [True, False]),
        ([], [False, False]),
    ],
)
def test_lost_samples_are_found(restarted, is_good):
    verdicts = compare_records(read_records(UNDISTURBED), read_records(restarted))
    assert [verdict.is_good for verdict in verdicts] == is_good


def usage(mib=100.0, files=10, threads=5, processes=2):
    return Usage(mib, files, threads, processes)


@pytest.mark.parametrize(
    ("rows", "is_good"),
    [
        ([usage()] * 16, [True] * 4),
        ([usage(mib=300.0)] * 4 + [usage()] * 12, [True] * 4),  # warming up
        ([usage(files=10 + i % 3 * 8) for i in range(16)], [True] * 4),  # coming and going
        ([usage(mib=100.0 + 2 * i) for i in range(16)], [False, True, True, True]),
        ([usage(files=10 + 2 * i) for i in range(16)], [True, False, True, True]),
        ([usage(threads=5 + i) for i in range(16)], [True, True, False, True]),
        ([usage(processes=2 + i // 2) for i in range(16)], [True, True, True, False]),
        ([usage()] * 3, [False]),
    ],
)
def test_growth_is_found(rows, is_good):
    assert [verdict.is_good for verdict in Watched("x", None, rows).verdicts()] == is_good


def test_open_files_are_counted(tmp_path):
    watched = Watched("this", psutil.Process())
    watched.sample()
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        watched.sample()
    assert watched.rows[1].files == watched.rows[0].files + 2 and watched.rows[0].processes >= 1


def test_a_process_that_has_ended_gives_no_row():
    child = subprocess.Popen([sys.executable, "-c", ""])
    watched = Watched("child", psutil.Process(child.pid))
    child.wait()
    watched.sample()
    assert not watched.rows


@pytest.mark.parametrize(
    ("status", "data", "outcome"),
    [
        (200, b'{"choices": [{"message": {"content": "a dog"}}]}', "answered"),
        (200, b'{"choices": [{"message": {"content": "a cat"}}]}', "wrong: 'a cat'"),
        (200, b'data: {"choices": [{"delta": {"content": "a dog"}}]}\n\ndata: [DONE]\n\n', "answered"),
        (200, b'data: {"choices": [{"delta": {"content": "a dog"}}]}\n\n', "wrong: 'an incomplete stream'"),
        (429, b"", "asked to retry later"),
        (500, b"", "wrong: status 500"),
    ],
)
def test_wrong_answers_are_found(status, data, outcome):
    assert judge("a dog", status, data) == outcome

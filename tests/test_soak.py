"""A short soak, and that the table finds what it is for; a long one: python -m tests.soak --minutes 60."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import soak

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what a process holds is read as Linux tells it")
def test_a_short_soak(tmp_path):
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.8", "--json", str(tmp_path / "soak.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-6000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    assert all(verdict[3] for verdict in result["verdicts"]) and len(result["verdicts"]) >= 20
    assert sum(result["done"]["ends of the broken run"].values()) >= 3 and len(result["done"]["requests"]) >= 6


def line(step, loss="0x1", texts="a", count=4):
    return json.dumps({"step": step, "entry": [loss, texts, count]})


def epoch(number, skipped=2):
    return json.dumps({"step": f"epoch {number}", "entry": [{"cc_sbu": {"image": skipped}}, 0.5]})


WHOLE = [line(step) for step in range(6)] + [epoch(0)]


@pytest.mark.parametrize(
    ("broken", "is_good"),
    [
        (WHOLE, [True, True]),
        ([*WHOLE[:4], *WHOLE[2:]], [True, True]),  # steps done again, as they were
        ([*WHOLE[:3], *WHOLE[4:]], [False, True]),  # a step was left out
        ([*WHOLE[:3], line(3, texts="b"), *WHOLE[4:]], [False, True]),  # other samples
        ([*WHOLE[:3], line(3, loss="0x2"), *WHOLE[3:]], [False, True]),  # another loss at first
        ([*WHOLE[:6], epoch(0, skipped=3)], [True, False]),
        ([], [False, False]),
    ],
)
def test_what_was_lost_is_found(broken, is_good):
    verdicts = soak.compare_ledgers(soak.read_ledger(WHOLE), soak.read_ledger(broken))
    assert [verdict.is_good for verdict in verdicts] == is_good


def held(mib=100.0, files=10, threads=5, processes=2):
    return soak.Held(mib, files, threads, processes)


@pytest.mark.parametrize(
    ("rows", "is_good"),
    [
        ([held()] * 16, [True] * 4),
        ([held(mib=300.0)] * 4 + [held()] * 12, [True] * 4),  # warming up
        ([held(files=10 + i % 3 * 8) for i in range(16)], [True] * 4),  # coming and going
        ([held(mib=100.0 + 2 * i) for i in range(16)], [False, True, True, True]),
        ([held(files=10 + 2 * i) for i in range(16)], [True, False, True, True]),
        ([held(threads=5 + i) for i in range(16)], [True, True, False, True]),
        ([held(processes=2 + i // 2) for i in range(16)], [True, True, True, False]),
        ([held()] * 3, [False]),
    ],
)
def test_what_grows_is_found(rows, is_good):
    assert [verdict.is_good for verdict in soak.Watched("x", None, rows).verdicts()] == is_good


def test_what_a_process_holds_is_seen(tmp_path):
    watched = soak.Watched("this", psutil.Process())
    watched.look()
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        watched.look()
    assert watched.rows[1].files == watched.rows[0].files + 2 and watched.rows[0].processes >= 1


def test_a_process_that_ends_meanwhile_gives_no_row():
    child = subprocess.Popen([sys.executable, "-c", ""])
    watched = soak.Watched("child", psutil.Process(child.pid))
    child.wait()
    watched.look()
    assert not watched.rows


@pytest.mark.parametrize(
    ("status", "data", "told"),
    [
        (200, b'{"choices": [{"message": {"content": "a dog"}}]}', "answered"),
        (200, b'{"choices": [{"message": {"content": "a cat"}}]}', "wrong: 'a cat'"),
        (200, b'data: {"choices": [{"delta": {"content": "a dog"}}]}\n\ndata: [DONE]\n\n', "answered"),
        (200, b'data: {"choices": [{"delta": {"content": "a dog"}}]}\n\n', "wrong: 'a stream that broke off'"),
        (429, b"", "told to come later"),
        (500, b"", "wrong: status 500"),
    ],
)
def test_wrong_answers_are_found(status, data, told):
    assert soak.Clients(0, ["a dog"], 0.0, 0)._judge(0, status, data) == told

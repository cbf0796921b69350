"""Shared functions of the benchmarks: plausible limits, timing in turns, a report that can be read back."""

import json
import time

import torch

from benchmarks import hardware

CPU = torch.device("cpu")


def test_limits_of_this_machine():
    about = hardware.describe(CPU)
    assert about["device"] and about["memory_gib"] > 0.5 and about["torch"] == torch.__version__
    assert 1e8 < hardware.measured_matrix_rate(CPU, torch.float32, repeats=1) < 1e15
    assert 1e8 < hardware.measured_bandwidth(CPU, repeats=1) < 1e13


def test_functions_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    times = hardware.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 2, warmup=1)
    assert "".join(calls) == "ababab" and set(times) == {"a", "b"} and all(t >= 0 for t in times.values())


def test_processor_time_is_measured_on_one_thread_and_does_not_count_sleep():
    threads, seen = torch.get_num_threads(), []
    functions = {"wait": lambda: (seen.append(torch.get_num_threads()), time.sleep(0.05))}
    times, used = hardware.wall_and_cpu_time(functions, CPU, 2)
    assert times["wait"] >= 0.05 and used["wait"] < 0.04
    assert seen == [threads] * 3 + [1] * 3 and torch.get_num_threads() == threads


def test_a_report_is_a_table_and_a_line_of_json(tmp_path, capsys):
    hardware.report([{"what": "x", "ms": 1.5}, {"what": "y", "ms": 2}], {"device": "d"}, tmp_path / "rows.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == ["| what | ms |", "|---|---|", "| x | 1.5 |"]
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content == json.loads(lines[-1]) and content["rows"][1] == {"what": "y", "ms": 2}

"""Shared by all benchmarks: the machine and its measured limits, timing in turns, a table with a line of JSON.

python -m benchmarks.hardware
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common.torch_setup import package_version


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, as plain values."""
    num_bytes, _ = devices.memory_left(device)
    packages = {"torch": torch.__version__, "transformers": package_version("transformers")}  # with +cu128 and the like
    return {
        "device": device_name(device),
        "kind": device.type,
        "memory_gib": round(num_bytes / 2**30, 1),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | packages


def device_name(device: torch.device) -> str:
    """The model of an accelerator or of the processor (Linux)."""
    if devices.has_own_memory(device):
        return torch.get_device_module(device).get_device_properties(device).name
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return next(names, "model name: unknown").partition(":")[2].strip()


def memory_mib(device: torch.device) -> float:
    """The memory in use now in MiB: of the device, or on a CPU of the process."""
    if devices.has_own_memory(device):
        return torch.get_device_module(device).memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, including the work that it queues on the device; earlier work is waited for first."""
    devices.synchronize(device)
    begin = time.perf_counter()
    function()
    devices.synchronize(device)
    return time.perf_counter() - begin


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 5,
    warmup: int = 1,
    measure: Callable[[Callable[[], Any], torch.device], float] | None = None,
) -> dict[str, float]:
    """Median seconds of each function, called in turns, so that other load on the machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            taken = (measure or seconds)(function, device)
            if i >= warmup:
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}


def cpu_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Processor time of a call on all cores, which other programs hardly change."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def wall_and_cpu_time(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = 5, warmup: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each function, called in turns, and on a CPU its processor time on one thread, else nothing.

    Threads that wait for each other use processor time, hence the one thread.
    """
    times = interleaved(functions, device, repeats, warmup)
    if device.type != "cpu":
        return times, {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    used = interleaved(functions, device, repeats, 1, cpu_seconds)
    torch.set_num_threads(num_threads)
    return times, used


def measured_matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP/s of a large square matrix product; a smaller one on slow devices, such as a CPU without half precision."""
    side, most = 256, 2048 if device.type == "cpu" else 8192
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = functools.partial(torch.mm, a, b, out=out)
        if side == most or seconds(product, device) > 0.1:
            return 2 * side**3 / interleaved({"product": product}, device, repeats)["product"]
        side *= 2


def measured_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes/s between the device and its memory, caches exceeded: the faster of a copy and a sum.

    A copy counts twice, as it reads and writes. On a CPU writes may read first, so that a sum can be faster.
    """
    num_bytes = 2**29 if device.type == "cpu" else 2**31
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    ways = {"copy": lambda: target.copy_(source), "sum": source.sum}
    taken = interleaved(ways, device, repeats)
    return max(2 * num_bytes / taken["copy"], num_bytes / taken["sum"])


def weights_mib(model: nn.Module) -> float:
    """MiB of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 2**20


def report(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], file: Path | None = None) -> None:
    """Prints rows of equal columns as a Markdown table and all as a line of JSON, which ``file`` receives too."""
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row[column]) for column in columns)} |")
    line = json.dumps({**about, "rows": [dict(row) for row in rows]})
    print(f"\n{line}", flush=True)
    if file is not None:
        file.write_text(line + "\n", encoding="utf-8")


def main() -> None:
    """The limits of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the line of JSON")
    args = parser.parse_args()
    device = devices.pick(args.device)
    rows = [{"limit": "memory, GB/s", "measured": round(measured_bandwidth(device) / 1e9, 1)}]
    for name, dtype in devices.DTYPES.items():
        rate = measured_matrix_rate(device, dtype) / 1e12
        rows.append({"limit": f"{name} product, TFLOP/s", "measured": round(rate, 3)})
    report(rows, describe(device), args.json)


if __name__ == "__main__":
    main()

"""Time and memory of a training step, compared with other implementations in turns within one process.

python -m benchmarks.train_step --preset small --stage 1 --compare blip2 plain
python -m benchmarks.train_step --preset small --dtype bf16 --compare blip2 fp32
python -m benchmarks.train_step --preset small --stage 1 --compile --compare uncompiled
python -m benchmarks.train_step --preset 7b --stage 1 --batch 64 --feature-cache --json rows.json

Weights are random. --compare takes one or more of:
  blip2       transformers' Blip2ForConditionalGeneration of the same sizes and precision on the same images and tokens:
              padded rows, scaled_dot_product_attention, logits at all positions; it always computes the vision side
  plain       the same with eager attention, as a direct port has it
  uncompiled  this project without --compile
  fp32        this project in float32
With --compile, compiled files of earlier runs are not used, so that compile time is included.
"""

import argparse
import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

# PyTorch has no public counter of compiled graphs.
from torch._dynamo.utils import counters

from benchmarks import hardware
from benchmarks.models import PRESETS, Preset, blip2_inputs, build_blip2, build_minigpt4, captions
from minigpt4.common import device as devices
from minigpt4.models.mini_gpt4 import IGNORE_INDEX, MiniGPT4

OURS = "ours"
ATTENTION = {"blip2": "sdpa", "plain": "eager"}  # of transformers' BLIP-2


def formula_flops(preset: Preset, num_tokens: float, batch: int, num_targets: float, has_vision: bool) -> float:
    """FLOPs of a step by formula: vision forward; LM forward and backward to its inputs, logits at targets only.

    A multiply-add counts two. The LM's attention scores, under 2 % of the total, are left out.
    """
    width, depth, _, inner = preset.lm
    lm = 2 * 2 * num_tokens * depth * (4 * width * width + 3 * width * inner)
    lm += 2 * 2 * num_targets * width * preset.vocabulary
    if not has_vision:
        return lm
    vit_width, vit_depth, _, ratio = preset.vit
    patches = (preset.image // 14) ** 2 + 1
    vit = 2 * patches * vit_depth * (4 + 2 * ratio) * vit_width**2 + 4 * patches**2 * vit_width * vit_depth
    q_width, q_depth, _ = preset.q_former
    queries, crossing = preset.queries, (q_depth + 1) // 2
    q = 2 * queries * q_depth * 12 * q_width**2
    q += crossing * (2 * queries * 2 * q_width**2 + 2 * patches * 2 * vit_width * q_width)
    return lm + batch * (vit + q)


def run_steps(step: Callable[[], None], count: int) -> None:
    """Runs several steps. A multiple of the number of batches leaves all ways at the same batch."""
    for _ in range(count):
        step()


def count_flops(step: Callable[[], None], count: int) -> float:
    """Mean FLOPs of the matrix products of ``count`` steps, as the profiler counts them, without attention kernels."""
    with torch.profiler.profile(with_flops=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_steps(step, count)
    return sum(event.flops for event in profile.key_averages()) / count


def mean_counts(model: MiniGPT4, batches: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Mean number of tokens of a batch, the same with padding, and of targets."""
    tokens = padded = targets = 0
    for batch in batches:
        rows = model.tokenize_rows(batch["text_input"], model.choose_prompts(batch))
        lengths = [len(row.ids) for row in rows]
        tokens, padded = tokens + sum(lengths), padded + max(lengths) * len(lengths)
        targets += sum(label != IGNORE_INDEX for row in rows for label in row.labels)
    return tokens / len(batches), padded / len(batches), targets / len(batches)


def make_step(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], dtype: torch.dtype, tokenizing: MiniGPT4
) -> Callable[[], None]:
    """A function that trains a model on the next batch, in the given precision; ``tokenizing`` tokenizes for BLIP-2."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)
    rounds = itertools.cycle(batches)

    def step() -> None:
        samples = dict(next(rounds))
        with devices.autocast(device, dtype):
            if isinstance(model, MiniGPT4):
                loss = model(samples)["loss"]
            else:
                loss = model(**blip2_inputs(tokenizing, samples, model.config.image_token_id), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(step: Callable[[], None], device: torch.device, count: int) -> float:
    """MiB that ``count`` steps allocate at their peak on top of the present; on a CPU as the profiler records it."""
    devices.synchronize(device)
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
        before = hardware.memory_mib(device)
        run_steps(step, count)
        return devices.max_memory_mib(device) - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_steps(step, count)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((each["ts"], each["args"]["Bytes"]) for each in trace if each.get("name") == "[memory]")
    return max(itertools.accumulate((num_bytes for _, num_bytes in changes), initial=0)) / 2**20


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--caption-tokens", type=int, help="mean length; default 12 in stage 1, 80 in stage 2")
    parser.add_argument("--feature-cache", action="store_true", help="train from features, without the vision side")
    parser.add_argument("--dtype", choices=devices.DTYPES, help="precision; default: the device's")
    parser.add_argument("--llm-precision", choices=("int8", "nf4"), help="quantised weights of the LM's layers")
    parser.add_argument("--compile", action="store_true", help="torch.compile the LM's layers and the vision side")
    parser.add_argument("--compare", nargs="+", choices=(*ATTENTION, "uncompiled", "fp32"), default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the line of JSON")
    return parser.parse_args()


def make_batches(args: argparse.Namespace, preset: Preset, device: torch.device) -> tuple[list[dict[str, Any]], ...]:
    """Four batches with images, and the same captions with features in their place."""
    shape = (args.batch, 3, preset.image, preset.image)
    mean = args.caption_tokens or {1: 12, 2: 80}[args.stage]
    texts = [captions(mean, args.batch, seed) for seed in range(4)]
    features = torch.randn(args.batch, preset.queries, preset.q_former[0], device=device).bfloat16()
    images = [{"image": torch.randn(shape, device=device), "text_input": text} for text in texts]
    return images, [{"features": features, "text_input": text} for text in texts]


def build_ways(
    args: argparse.Namespace, preset: Preset, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], dict[str, Callable[[], None]], list[dict[str, Any]]]:
    """Models and steps by name, ours first, and the batches that ours trains on."""
    images, features = make_batches(args, preset, device)
    batches = features if args.feature_cache else images
    settings = (args.stage, not args.feature_cache, args.llm_precision)
    models: dict[str, nn.Module] = {OURS: build_minigpt4(preset, device, dtype, *settings)}
    steps = {OURS: make_step(models[OURS], batches, dtype, models[OURS])}
    for name in args.compare:
        way_dtype = torch.float32 if name == "fp32" else dtype
        if name in ATTENTION:
            models[name] = build_blip2(preset, device, dtype, ATTENTION[name])
        else:
            models[name] = build_minigpt4(preset, device, way_dtype, *settings)
        steps[name] = make_step(models[name], images if name in ATTENTION else batches, way_dtype, models[OURS])
    return models, steps, batches


def print_ratios(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each comparison: ours to the other."""
    for row in rows[1:]:
        for key in ("ms a step", "CPU ms on one thread", "peak above, MiB"):
            if row[key]:
                print(f"{OURS} / {row['way']}, {key}: {rows[0][key] / row[key]:.3f}")


def main() -> None:
    """Builds, counts, times and prints."""
    args = parse_arguments()
    device, preset = devices.pick(args.device), PRESETS[args.preset]
    dtype = devices.DTYPES[args.dtype] if args.dtype else devices.default_dtype(device)
    if args.compile:
        fresh = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = fresh.name
    torch.manual_seed(0)
    random.seed(0)
    about = hardware.describe(device)
    models, steps, batches = build_ways(args, preset, device, dtype)
    ours = models[OURS]
    num_tokens, num_padded, num_targets = mean_counts(ours, batches)
    for name in args.compare:
        run_steps(steps[name], len(batches))  # what a process does once is done
    if args.compile:
        with devices.autocast(device, dtype):
            ours.compile_parts()
    first = hardware.seconds(lambda: run_steps(steps[OURS], len(batches)), device)
    num_graphs = counters["stats"]["unique_graphs"]
    flops = formula_flops(preset, num_tokens, args.batch, num_targets, not args.feature_cache)
    rate, bandwidth = hardware.measured_matrix_rate(device, dtype), hardware.measured_bandwidth(device)
    times, used = hardware.wall_and_cpu_time(steps, device, args.repeats, 2)
    run_steps(steps[OURS], len(batches))  # all lengths again: nothing may be compiled any more
    num_recompiled = counters["stats"]["unique_graphs"] - num_graphs
    rows = [
        {
            "way": name,
            "ms a step": round(1e3 * times[name], 1),
            "CPU ms on one thread": round(1e3 * used[name], 1) if used else "",
            "images/s": round(args.batch / times[name], 2),
            "padded tokens/s": round(num_padded / times[name]),
            "real tokens/s": round(num_tokens / times[name]),
            "of matrix rate": f"{flops / times[name] / rate:.0%}" if name == OURS else "",
            "weights, MiB": round(hardware.weights_mib(model)),
            "peak above, MiB": round(peak_memory(steps[name], device, len(batches)), 1),
        }
        for name, model in models.items()
    ]
    compiling = first - len(batches) * times[OURS]
    about |= {
        "preset": args.preset,
        "stage": args.stage,
        "batch": args.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "feature_cache": args.feature_cache,
        "llm_precision": args.llm_precision or "as dtype",
        "compile": args.compile and f"{num_graphs} graphs in {compiling:.1f} s, {num_recompiled} in steady state",
        "mean_tokens_a_row": round(num_tokens / args.batch, 1),
        "padded_length": round(num_padded / args.batch, 1),
        "gflop_by_formula": round(flops / 1e9, 1),
        "gflop_counted": round(count_flops(steps[OURS], len(batches)) / 1e9, 1),
        "matrix_tflops": round(rate / 1e12, 3),
        "bandwidth_gbs": round(bandwidth / 1e9, 1),
    }
    hardware.report(rows, about, args.json)
    print_ratios(rows)


if __name__ == "__main__":
    main()

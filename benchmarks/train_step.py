"""Time and memory of a training step beside the plain way of computing it, interleaved in one process.

python -m benchmarks.train_step --preset small --stage 1 --compare plain
python -m benchmarks.train_step --preset small --stage 1 --compile --compare uncompiled
python -m benchmarks.train_step --preset 7b --stage 1 --batch 64 --feature-cache --json rows.json

Weights are random and made on the device. The plain way is what a direct port does: eager attention everywhere, logits
and loss at every position, rows padded to the longest behind a mask, nothing computed once, nothing compiled. With
``--compile``, compiled files of earlier runs are not used, so that what compiling takes is seen.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import hardware
from minigpt4.common import device as devices
from minigpt4.common.optims import parameter_groups
from minigpt4.models import MiniGPT4, Qformer, eva_vit
from minigpt4.models.eva_vit import build_eva_vit
from minigpt4.models.int8 import to_int8
from minigpt4.models.llama import Llama, LlamaConfig
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.mini_gpt4 import IGNORE_INDEX
from minigpt4.models.Qformer import QFormer, QFormerConfig

ROOT = Path(__file__).parents[1]
TEMPLATE = "###Human: {} ###Assistant: "
PROMPT = TEMPLATE.format("<Img><ImageHere></Img> Describe this image in detail.")


@dataclass(frozen=True)
class Preset:
    """Widths and depths: vision tower, Q-Former, language model."""

    vit: tuple[int, int, int, float]  # width, layers, heads, MLP ratio
    q_former: tuple[int, int, int]  # width, layers, heads
    lm: tuple[int, int, int, int]  # width, layers, heads, MLP width
    vocabulary: int = 32000
    image: int = 224
    queries: int = 32


PRESETS = {
    "tiny": Preset((64, 2, 4, 4.0), (64, 2, 4), (64, 2, 4, 172), image=56),
    "small": Preset((384, 8, 6, 4.0), (384, 6, 6), (512, 8, 8, 1376)),
    "7b": Preset((1408, 39, 16, 4.3637), (768, 12, 12), (4096, 32, 32, 11008), vocabulary=32001),
    "13b": Preset((1408, 39, 16, 4.3637), (768, 12, 12), (5120, 40, 40, 13824), vocabulary=32001),
}


def build_llama(preset: Preset, device: torch.device, is_plain: bool) -> nn.Module:
    """A frozen language model with random weights, made on the device in the precision of a real run.

    The plain one is that of transformers, with its eager attention.
    """
    import transformers

    width, depth, heads, inner = preset.lm
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    sizes |= {"intermediate_size": inner, "vocab_size": preset.vocabulary}
    torch.set_default_dtype(devices.default_dtype(device))
    with device:
        if is_plain:
            config = transformers.LlamaConfig(**sizes, attn_implementation="eager")
            llama = transformers.LlamaForCausalLM(config)
        else:
            llama = Llama(LlamaConfig(**sizes))
    torch.set_default_dtype(torch.float32)
    return llama.requires_grad_(False).eval()


def build(preset: Preset, device: torch.device, stage: int, is_plain: bool, has_vision: bool) -> MiniGPT4:
    """A model with random weights, made on the device in the precisions of a real run."""
    half, llama = devices.default_dtype(device), build_llama(preset, device, is_plain)
    vit_width, vit_depth, vit_heads, ratio = preset.vit
    q_width, q_depth, q_heads = preset.q_former
    with device:
        vit = build_eva_vit(
            preset.image,
            vit_config={"embed_dim": vit_width, "depth": vit_depth, "num_heads": vit_heads, "mlp_ratio": ratio},
        )
        q_former = QFormer(
            QFormerConfig(
                hidden_size=q_width,
                num_hidden_layers=q_depth,
                num_attention_heads=q_heads,
                intermediate_size=4 * q_width,
                encoder_width=vit_width,
            )
        )
        model = MiniGPT4(
            vit if has_vision else None,
            q_former if has_vision else q_former.config,
            llama,
            load_tokenizer(ROOT / "quickstart" / "weights" / "llama"),
            num_query_token=preset.queries,
            prompts=[PROMPT] if stage == 2 else (),
            prompt_template=TEMPLATE if stage == 2 else "",
            max_txt_len=160 if stage == 2 else 32,
            end_sym="###" if stage == 2 else "\n",
            vit_dtype=half,
        )
    if half != torch.float32:
        for module in vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(half)
    return model.to(device)


def captions(mean: int, batch: int, seed: int) -> list[str]:
    """Texts of known words, each a token, spread about a mean as captions are: most a bit shorter, some far longer."""
    rng = random.Random(seed)
    words = ["large", "small", "red", "green", "blue", "circle", "square", "triangle", "left", "right", "top"]
    lengths = [min(8 * mean // 3 - 1, max(4, round(mean * rng.lognormvariate(-0.06, 0.35)))) for _ in range(batch)]
    return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]


def plain_loss(model: MiniGPT4, samples: dict[str, Any]) -> Tensor:
    """The loss of a batch as a direct port computes it."""
    image_embeds = samples.get("embeds")
    if image_embeds is None:
        with torch.no_grad(), _eager_attention():
            query_output = model.encode_images(samples["image"])
        image_embeds = model.llama_proj(query_output)
    ids, mask, labels = model.pack(samples["text_input"], model.choose_prompts(samples))
    device = image_embeds.device
    embeds = model.embed_inputs(ids.to(device), image_embeds)
    logits = model.llama_model(inputs_embeds=embeds, attention_mask=mask.to(device), use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(device))


@contextmanager
def _eager_attention() -> Iterator[None]:
    """Vision's attention by two products and a softmax, the weights a tensor of their own."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value

    fused = eva_vit.scaled_dot_product_attention
    eva_vit.scaled_dot_product_attention = Qformer.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        eva_vit.scaled_dot_product_attention = Qformer.scaled_dot_product_attention = fused


def formula_flops(preset: Preset, num_tokens: int, batch: int, num_targets: int, has_vision: bool) -> float:
    """FLOPs of a step by formula: vision forward, LM forward and backward of its inputs, logits of targets likewise.

    Two a multiply-add; attention with the longest-row grid left out, which is under 2 % of the whole.
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


def means(model: MiniGPT4, batches: list[dict[str, Any]]) -> list[float]:
    """Tokens of a batch without and with padding, and targets."""
    packed = [model.pack(batch["text_input"], model.choose_prompts(batch))[1:] for batch in batches]
    counts = [(mask.sum(), mask.numel(), (labels != IGNORE_INDEX).sum()) for mask, labels in packed]
    return [float(sum(each)) / len(batches) for each in zip(*counts, strict=True)]


def stepper(model: MiniGPT4, batches: list[dict[str, Any]], device: torch.device, is_plain: bool) -> Callable[[], None]:
    """A function that does one training step on the next batch."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4)
    turn = iter(range(10**9))
    dtype = devices.default_dtype(device)

    def step() -> None:
        samples = dict(batches[next(turn) % len(batches)])
        with devices.autocast(device, dtype):
            if is_plain:
                if "features" in samples:
                    samples["embeds"] = model.llama_proj(samples.pop("features").to(model.llama_proj.weight.dtype))
                loss = plain_loss(model, samples)
            else:
                loss = model(samples)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_above(step: Callable[[], None], device: torch.device) -> float:
    """MiB that a step holds at its peak above what stays: by the allocator, on a CPU by its recorded allocations."""
    step()
    devices.synchronize(device)
    if device.type != "cpu":
        devices.reset_peak_memory(device)
        before = devices.memory_mib(device)
        step()
        return devices.max_memory_mib(device) - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    peak = now = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def main() -> None:
    """Builds, counts, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--caption-tokens", type=int, help="their mean: 12 in stage 1, as BLIP's, and 80 in stage 2")
    parser.add_argument("--feature-cache", action="store_true", help="features are read, vision is not in memory")
    parser.add_argument("--llm-precision", choices=("int8",), help="instead of the device's half precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the LM's layers and the vision side")
    parser.add_argument("--compare", choices=("plain", "uncompiled"), help="a second way, in turns with the first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where the line of JSON goes, too")
    args = parser.parse_args()
    device, preset = devices.pick(args.device), PRESETS[args.preset]
    about = hardware.describe(device)
    if args.compile:
        fresh = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = fresh.name
    torch.manual_seed(0)
    random.seed(0)
    mean = args.caption_tokens or {1: 12, 2: 80}[args.stage]
    shape = (args.batch, 3, preset.image, preset.image)
    batches = [
        {"image": torch.randn(shape, device=device), "text_input": captions(mean, args.batch, seed)}
        for seed in range(4)
    ]
    features = torch.randn(args.batch, preset.queries, preset.q_former[0], device=device).bfloat16()
    cached = [{"features": features, "text_input": batch["text_input"]} for batch in batches]

    steps, models = {}, {}
    ways = ["ours"] + [args.compare] * (args.compare is not None)
    for way in ways:
        is_plain, has_vision = way == "plain", way == "plain" or not args.feature_cache
        models[way] = build(preset, device, args.stage, is_plain, has_vision)
        if args.llm_precision == "int8" and not is_plain:
            to_int8(models[way].llama_model)
        steps[way] = stepper(models[way], batches if has_vision else cached, device, is_plain)
    ours = models["ours"]
    num_tokens, num_padded, num_targets = means(ours, batches)
    if args.compare:
        steps[args.compare]()  # whatever a process does once is done
    if args.compile:
        with devices.autocast(device, devices.default_dtype(device)):
            ours.compile_parts()
    begin = time.perf_counter()
    for _ in batches:
        steps["ours"]()
    devices.synchronize(device)
    first, num_graphs = time.perf_counter() - begin, counters["stats"]["unique_graphs"]
    flops = formula_flops(preset, num_tokens, args.batch, num_targets, not args.feature_cache)
    with FlopCounterMode(display=False) as counter:
        steps["ours"]()
    rate = hardware.measured_matrix_rate(device, devices.default_dtype(device))
    bandwidth = hardware.measured_bandwidth(device)
    times = hardware.interleaved(steps, device, args.repeats, 2)
    for _ in batches:  # other lengths again: nothing may be compiled any more
        steps["ours"]()
    num_recompiled = counters["stats"]["unique_graphs"] - num_graphs
    compiling = first - len(batches) * times["ours"]
    used = {}
    if device.type == "cpu":  # one thread: threads that wait for each other would count as work
        torch.set_num_threads(1)
        used = hardware.interleaved(steps, device, args.repeats, 1, hardware.cpu_seconds)
        torch.set_num_threads(about["threads"])
    rows = []
    for name, model in models.items():
        weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 2**20
        rows.append(
            {
                "way": name,
                "ms a step": round(1e3 * times[name], 1),
                "CPU ms on one thread": round(1e3 * used[name], 1) if used else "",
                "images/s": round(args.batch / times[name], 2),
                "padded tokens/s": round(num_padded / times[name]),
                "real tokens/s": round(num_tokens / times[name]),
                "of matrix rate": f"{flops / times[name] / rate:.0%}" if name == "ours" else "",
                "weights, MiB": round(weights),
                "peak above, MiB": round(peak_above(steps[name], device), 1),
            }
        )
    about |= {
        "preset": args.preset,
        "stage": args.stage,
        "batch": args.batch,
        "dtype": str(devices.default_dtype(device)).removeprefix("torch."),
        "feature_cache": args.feature_cache,
        "llm_precision": args.llm_precision or "half",
        "compile": args.compile
        and f"{num_graphs} graphs in {compiling:.1f} s, {num_recompiled} of them in steady state",
        "mean_tokens_a_row": round(num_tokens / args.batch, 1),
        "padded_length": round(num_padded / args.batch, 1),
        "gflop_by_formula": round(flops / 1e9, 1),
        "gflop_counted": round(counter.get_total_flops() / 1e9, 1),
        "matrix_tflops": round(rate / 1e12, 3),
        "bandwidth_gbs": round(bandwidth / 1e9, 1),
    }
    hardware.report(rows, about, args.json)
    if args.compare:
        for key in ("ms a step", "CPU ms on one thread", "peak above, MiB"):
            if rows[1][key]:
                print(f"\nours / {args.compare}, {key}: {rows[0][key] / rows[1][key]:.3f}", end="")
        print()
    if args.compile and args.compare == "uncompiled":
        saved = times["uncompiled"] - times["ours"]
        share = saved / times["uncompiled"]
        print(f"compiling took {compiling:.1f} s; a step saves {1e3 * saved:.1f} ms ({share:.1%})")


if __name__ == "__main__":
    main()

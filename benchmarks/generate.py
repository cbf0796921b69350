"""Greedy decoding of one chat and of a batch, beside what memory bandwidth allows and beside transformers' generate.

python -m benchmarks.generate --preset small --compare plain
python -m benchmarks.generate --preset 7b --batch 1 16 --json rows.json

Weights are random and made on the device. A token reads all weights of the language model once, whatever the batch,
and the keys and values of each row so far: these bytes over the measured bandwidth are the least time it can take.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hardware
from benchmarks.models import PRESETS, build_language_model, build_plain_language_model
from minigpt4.common import device as devices
from minigpt4.conversation.generation import DecodingState, GenerationOptions

BOS_IDS, EOS_IDS = [1], []  # random models do not end early


def ours(llm: nn.Module, embeds: Tensor, mask: Tensor, num_tokens: int) -> Iterator[Any]:
    """Yields whenever each row has one token more."""
    options = GenerationOptions(do_sample=False, max_new_tokens=num_tokens)
    state = DecodingState(llm, BOS_IDS, EOS_IDS, devices.recorder(embeds.device))
    yield state.add(embeds, mask, [options] * len(embeds))
    while state.rows:
        yield state.step()


def plain(llm: nn.Module, embeds: Tensor, mask: Tensor, num_tokens: int) -> Iterator[None]:
    """The same by transformers: its streamer says when a token is there, a batch cannot be streamed."""
    begun = []

    class Streamer:
        """Counts tokens."""

        def put(self, _: Tensor) -> None:
            """A token."""
            begun.append(time.perf_counter())

        def end(self) -> None:
            """The end."""

    llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask.to(embeds.device),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        streamer=Streamer() if len(embeds) == 1 else None,
    )
    yield from begun


def measure(decode: Callable[[int], Iterator[Any]], num_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""

    def run(count: int) -> None:
        for _ in decode(count):
            pass

    first = hardware.seconds(lambda: run(1), device)
    return first, (hardware.seconds(lambda: run(num_tokens), device) - first) / (num_tokens - 1)


def token_bytes(llm: nn.Module, batch: int, length: float) -> float:
    """Bytes that one token of each row must read: all weights but the embeddings, and all keys and values so far."""
    config, weights = llm.config, sum(p.nbytes for p in llm.parameters())
    weights += sum(b.nbytes for b in llm.buffers())
    weights -= llm.model.embed_tokens.weight.nbytes
    itemsize = llm.model.embed_tokens.weight.itemsize
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return weights + 2 * config.num_hidden_layers * batch * length * width * itemsize


def main() -> None:
    """Builds, times in turns and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=80, help="tokens read before: an image and a question")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded")
    parser.add_argument("--llm-precision", choices=("int8",), help="instead of the device's half precision")
    parser.add_argument("--compare", choices=("plain",))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the line of JSON goes, too")
    args = parser.parse_args()
    device, preset = devices.pick(args.device), PRESETS[args.preset]
    torch.manual_seed(0)
    dtype = devices.default_dtype(device)
    llms = {"ours": (ours, build_language_model(preset, device, dtype, args.llm_precision))}
    if args.compare:
        llms["plain"] = plain, build_plain_language_model(preset, device, dtype)
    bandwidth = hardware.measured_bandwidth(device)
    rows = []
    for batch in args.batch:
        embeds = torch.randn(batch, args.context, preset.lm[0], device=device).to(devices.default_dtype(device))
        mask = torch.ones(batch, args.context, dtype=torch.long)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in llms}
        for i in range(1 + args.repeats):  # in turns; the first one does not count
            for name, (decode, llm) in llms.items():
                taken = measure(lambda n, d=decode, m=llm, e=embeds, k=mask: d(m, e, k, n), args.tokens, device)
                times[name].extend([taken] if i else [])
        for name, (_, llm) in llms.items():
            first, each = map(statistics.median, zip(*times[name], strict=True))
            least = token_bytes(llm, batch, args.context + args.tokens / 2) / bandwidth
            rows.append(
                {
                    "way": name,
                    "chats": batch,
                    "first token, ms": round(1e3 * first, 2),
                    "ms a token": round(1e3 * each, 3),
                    "tokens/s": round(batch / each, 1),
                    "bandwidth allows": round(batch / least, 1),
                    "share of it": f"{least / each:.0%}",
                }
            )
    about = hardware.describe(device) | {
        "preset": args.preset,
        "dtype": str(devices.default_dtype(device)).removeprefix("torch."),
        "llm_precision": args.llm_precision or "half",
        "context": args.context,
        "tokens": args.tokens,
        "bandwidth_gbs": round(bandwidth / 1e9, 1),
    }
    hardware.report(rows, about, args.json)


if __name__ == "__main__":
    main()

"""Time of a decoded token with 8-bit weights, compared with bfloat16 weights token by token in turns.

python -m benchmarks.int8_decoding
python -m benchmarks.int8_decoding --preset 7b --json rows.json

Both models continue one row. Each round decodes a token with one model and then with the other, so that whatever else
the machine does affects both alike.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import hardware
from benchmarks.models import PRESETS, Preset, build_language_model
from minigpt4.common import device as devices
from minigpt4.models import language_model as lm
from minigpt4.models.growing_cache import new_cache

WIDE = Preset((64, 2, 4, 4.0), (64, 2, 4), (2048, 8, 16, 5504))


def make_decoder(llm: nn.Module, context: int, device: torch.device) -> Callable[[], None]:
    """A function that decodes one more token greedily, after a context of ``context`` random embeddings."""
    cache, embedding = new_cache(), llm.get_input_embeddings()
    embeds = 0.02 * torch.randn(1, context, embedding.weight.shape[1], device=device).to(embedding.weight.dtype)
    lengths = itertools.count(context)

    def decode() -> None:
        nonlocal embeds
        with torch.inference_mode():
            mask = torch.ones(1, next(lengths), dtype=torch.long)
            logits = lm.next_token_logits(llm, embeds, mask, cache)
            embeds = embedding(logits.argmax(-1, keepdim=True))

    decode()
    return decode


def main() -> None:
    """Builds, times in turns and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = {"wide": WIDE} | PRESETS
    parser.add_argument("--preset", choices=presets, default="wide", help="wide: width 2048, 8 layers")
    parser.add_argument("--context", type=int, default=80, help="tokens before the first decoded one")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded with each model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the line of JSON")
    args = parser.parse_args()
    device, preset = devices.pick(args.device), presets[args.preset]
    about = hardware.describe(device)
    torch.manual_seed(0)
    llms = {
        "int8": build_language_model(preset, device, torch.bfloat16, kind="int8"),
        "bf16": build_language_model(preset, device, torch.bfloat16),
    }
    decoders = {name: make_decoder(llm, args.context, device) for name, llm in llms.items()}
    times, used = hardware.wall_and_cpu_time(decoders, device, args.tokens, 2)
    rows = [
        {
            "weights": name,
            "MiB": round(hardware.weights_mib(llm)),
            "ms a token": round(1e3 * times[name], 2),
            "CPU ms on one thread": round(1e3 * used[name], 2) if used else "",
        }
        for name, llm in llms.items()
    ]
    hardware.report(rows, about | {"preset": args.preset, "context": args.context, "tokens": args.tokens}, args.json)
    for key in ("ms a token", "CPU ms on one thread"):
        if rows[1][key]:
            print(f"int8 / bf16, {key}: {rows[0][key] / rows[1][key]:.3f}")


if __name__ == "__main__":
    main()

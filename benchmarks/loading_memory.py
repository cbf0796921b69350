"""Host memory of several processes on one machine that load the same language model at the same time.

python -m benchmarks.loading_memory --ranks 4 --gib 1

Measures the proportional set size: a page that four processes share counts a quarter in each. Reports the peak while
loading, minus what the processes held before, relative to the size of the weights. Linux only.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from minigpt4.models.language_model import load_language_model


def write_folder(folder: Path, gib: float, dtype: torch.dtype, kind: str, num_files: int = 4) -> int:
    """Writes a Llama folder of about ``gib`` GiB with random weights in several files; returns its size in bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    width, vocabulary = 1024, 8000
    num_layers = max(1, round((gib * 2**30 / dtype.itemsize - 2 * width * vocabulary) / (16 * width * width)))
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": vocabulary}
    config = LlamaConfig(**sizes, num_hidden_layers=num_layers, num_attention_heads=16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    weight_map, total = {}, 0
    for i in range(num_files):
        file = f"{stem}-{i + 1:05}-of-{num_files:05}.{kind}"
        part = {name: torch.empty(shapes[name], dtype=dtype) for name in list(shapes)[i::num_files]}
        for value in part.values():
            value.fill_(1) if value.ndim == 1 else value.uniform_(-0.02, 0.02)
        save_file(part, folder / file, {"format": "pt"}) if kind == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
        total += sum(value.nbytes for value in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _load(folder: Path, dtype: torch.dtype, barrier: Barrier) -> None:
    barrier.wait()
    barrier.wait()
    model = load_language_model(folder, dtype)
    model.model.embed_tokens.weight.sum()
    barrier.wait()  # all processes hold all weights
    barrier.wait()


def _pss(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def measure(folder: Path, ranks: int, dtype: torch.dtype) -> int:
    """Peak memory of all ranks together while loading, minus what they held before, in bytes."""

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks + 1)
    processes = [context.Process(target=_load, args=(folder, dtype, barrier)) for _ in range(ranks)]
    for process in processes:
        process.start()
    pids = [process.pid for process in processes]
    barrier.wait()
    before = peak = _pss(pids)
    barrier.wait()
    while barrier.n_waiting < ranks:
        peak = max(peak, _pss(pids))
        time.sleep(0.02)
    peak = max(peak, _pss(pids))
    barrier.wait()
    barrier.wait()
    for process in processes:
        process.join()
    return peak - before


def main() -> None:
    """Prints a row for each file format and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    print("| files | precision | ranks | size | peak of all ranks together | ratio |\n|---|---|---|---|---|---|")
    for kind, dtype in (("safetensors", torch.float32), ("safetensors", torch.bfloat16), ("bin", torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            size = write_folder(Path(folder), args.gib, dtype, kind)
            peak = measure(Path(folder), args.ranks, dtype)
        row = (f".{kind}", str(dtype)[6:], args.ranks, f"{size / 2**20:.0f} MiB", f"{peak / 2**20:.0f} MiB")
        print(f"| {' | '.join(map(str, row))} | {peak / size:.2f} |")


if __name__ == "__main__":
    main()

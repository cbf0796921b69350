"""Adds a published Vicuna delta to its LLaMA base: python -m minigpt4.tools.apply_delta; see PrepareVicuna.md.

The files are memory-mapped and written one shard at a time, so the whole model is never in memory.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.models.language_model import HUB_FILES, MIN_NORM, check_folder
from minigpt4.tools.model_folder import check_new, command, new_folder, write_json, write_shards

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")  # one row per token
FINAL_NORM = "model.norm.weight"
VICUNA_V0_ROWS, NUM_ROWS = 32001, 64  # LLaMA has 32000; rows of each matrix in which base and delta are compared
EQUAL_CONFIG_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json")
GENERATION_FILE = "generation_config.json"


class ModelFolder(NamedTuple):
    """A Llama's folder, its config.json, and its memory-mapped tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_folder(folder: Path, key: str) -> ModelFolder:
    """Maps the tensors of a folder; a UserError if a file is missing or damaged, or it holds no Llama."""
    config, tensors = check_folder(folder, key), {}
    for file in weights.weight_files(folder, key):
        content = weights.read_file(file, key)
        weights.check_tensors(content, file, key)  # old files also store rotary frequencies, which are computed today
        tensors |= {name: value for name, value in content.items() if not name.endswith("rotary_emb.inv_freq")}
    if missing := {*VOCABULARY_TENSORS, FINAL_NORM} - tensors.keys():
        raise UserError(f"{key}: {folder} has no tensor '{min(missing)}'; expected a Llama language model.")
    rows, vocab_size = {len(tensors[name]) for name in VOCABULARY_TENSORS}, config.get("vocab_size")
    if rows != {vocab_size}:
        sizes = f"embeddings of {max(rows)} tokens, but config.json has vocab_size {vocab_size}"
        raise UserError(f"{key}: {folder} has {sizes}; it mixes two versions, take all files from one.")
    return ModelFolder(folder, config, tensors)


def apply_delta(base_folder: Path, delta_folder: Path, target: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the model base + delta, summed in float32 and rounded once to ``dtype``.

    The delta's configuration and tokenizer become the model's, and rows that only the delta has (the padding token of
    Vicuna v0) are copied. ``target`` must not exist or be empty; it appears when all files are complete. Raises
    UserError if the two do not match, the target is not empty, or the disk is full.
    """
    if base_folder.resolve() == delta_folder.resolve():
        raise UserError(f"--base and --delta are the same folder, {base_folder}; expected two.")
    check_new(target, "--target")
    base, delta = read_folder(base_folder, "--base"), read_folder(delta_folder, "--delta")
    _check_match(base, delta)
    tokenizer = next((folder for folder in (delta_folder, base_folder) if (folder / "tokenizer.model").is_file()), None)
    if tokenizer is None:
        raise UserError(f"Neither {delta_folder} nor {base_folder} has a tokenizer.model; copy it into the delta.")
    shapes = {name: (value.shape, dtype) for name, value in delta.tensors.items()}
    with new_folder(target, "--target") as partial:
        write_shards(partial, shapes, lambda name: _sum(base, delta, name, dtype), "--target")
        patterns = [(tokenizer, pattern) for pattern in TOKENIZER_FILES]
        for folder, pattern in [*patterns, (base_folder, GENERATION_FILE), (delta_folder, GENERATION_FILE)]:
            for file in folder.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        config = {name: value for name, value in delta.config.items() if name != "_name_or_path"}
        write_json(partial / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})


def _check_match(base: ModelFolder, delta: ModelFolder) -> None:
    if differing := [name for name in EQUAL_CONFIG_KEYS if base.config.get(name) != delta.config.get(name)]:
        values = ", ".join(f"{name} {base.config.get(name)} and {delta.config.get(name)}" for name in differing)
        advice = "Take the same size (7B or 13B), and the first LLaMA, not Llama 2."
        raise UserError(f"--base {base.folder} and --delta {delta.folder} are of different models: {values}. {advice}")
    if only_one := sorted(base.tensors.keys() ^ delta.tensors.keys()):
        side = "--base" if only_one[0] in base.tensors else "--delta"
        difference = f"--base and --delta differ in {len(only_one)} names; '{only_one[0]}' is only in {side}"
        raise UserError(f"{difference}. One is not a plain Llama (quantised, for example), or a file is missing.")
    base_is_delta, delta_is_delta = (m.tensors[FINAL_NORM].float().abs().mean() < MIN_NORM for m in (base, delta))
    if base_is_delta:
        raise UserError(f"--base: {base.folder} is a delta, not LLaMA; perhaps --base and --delta are swapped.")
    if not delta_is_delta:
        raise UserError(f"--delta: {delta.folder} is a whole model, not a delta; use it as it is.")
    base_rows, rows = (len(model.tensors[VOCABULARY_TENSORS[0]]) for model in (base, delta))
    if rows - base_rows not in (0, 1):
        expected = "expected the same number (v1.1) or one more in the delta (v0)"
        raise UserError(f"--base has {base_rows} tokens and --delta {rows}; {expected}.")
    if base_rows == VICUNA_V0_ROWS:
        problem = f"{base.folder} has {base_rows} tokens, LLaMA 32000: it is Vicuna v0, to which the delta is added"
        raise UserError(f"--base: {problem} already. Use it as it is, or take the first LLaMA.")
    for name, value in delta.tensors.items():
        start, shape, base_shape = int(name in VOCABULARY_TENSORS), list(value.shape), list(base.tensors[name].shape)
        if shape[start:] != base_shape[start:]:
            raise UserError(f"'{name}' is {base_shape} in --base and {shape} in --delta.")
    if 1e-4 < (share := _share_of_inexact_sums(base, delta)) < 0.5:
        problem = (
            f"{base.folder} is not the model that {delta.folder} was computed from ({share:.1%} of sums are inexact)"
        )
        cause = "perhaps it is Vicuna already, another fine-tuned LLaMA, or was rounded to bf16"
        raise UserError(f"--base: {problem}; {cause}. Take the first LLaMA in fp16.")


def _share_of_inexact_sums(base: ModelFolder, delta: ModelFolder) -> float:
    """The share of sampled sums that are no fp16 numbers.

    A delta is the difference of two models in fp16. Where both numbers are of similar size their difference is exact
    (Sterbenz, 1974), so there the sum with the right base is an fp16 number. With a fine-tuned model as base, a few per
    cent of the sums are not, as their exponent is larger. Nearly all are inexact where base and delta are unrelated, or
    the delta was computed in another precision.
    """
    num_inexact, num_sums = 0, 1
    for name, value in delta.tensors.items():
        other = base.tensors[name]
        if other.ndim == 2 and other.dtype != torch.bfloat16:
            rows = slice(0, len(other), max(1, len(other) // NUM_ROWS))
            first, second = other[rows].float(), value[rows].float()
            total, is_similar = first + second, second.abs() <= first.abs() / 4
            num_sums += int(is_similar.sum())
            num_inexact += int((is_similar & (total.half() != total)).sum())
    return num_inexact / num_sums


def _sum(base: ModelFolder, delta: ModelFolder, name: str, dtype: torch.dtype) -> Tensor:
    total = delta.tensors[name].to(torch.float32, copy=True)
    total[: len(base.tensors[name])] += base.tensors[name]
    if not (total := total.to(dtype)).isfinite().all():
        raise UserError(f"'{name}' of the sum is not finite in {dtype}; one of the two folders is damaged.")
    return total


@command
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m minigpt4.tools.apply_delta", description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="LLaMA: a Hugging Face folder or a hub id")
    parser.add_argument("--delta", required=True, help="delta of the same size: a folder or a hub id")
    parser.add_argument("--target", required=True, type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the written weights (default fp16)")
    options = parser.parse_args(arguments)
    target = options.target.expanduser()
    base, delta = (locate(getattr(options, name), f"--{name}", HUB_FILES, ("*",)) for name in ("base", "delta"))
    apply_delta(base, delta, target, DTYPES[options.dtype])
    rows = json.loads((target / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    kind = weights.VOCABULARIES.get(rows, "no Vicuna")
    print(f"{target} is complete: {rows} tokens ({kind}); set model.llama_model to it.")
    print("The published MiniGPT-4 checkpoints need Vicuna v0, which has 32001 tokens.")


if __name__ == "__main__":
    sys.exit(main())

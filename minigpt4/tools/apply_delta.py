"""Adds a published Vicuna delta to its LLaMA base: python -m minigpt4.tools.apply_delta; see PrepareVicuna.md.

Tensors are read one at a time and written one shard at a time, so the whole model is never in memory.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.models.language_model import MIN_NORM, check_folder, weight_files

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 2 * 10**9  # of one written file, which is assembled in memory
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")  # one row per token
FINAL_NORM = "model.norm.weight"
EQUAL_CONFIG_KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps"),
)
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


class WeightFolder:
    """A Hugging Face folder of a Llama whose tensors are read on demand.

    Args:
        folder: config.json beside .safetensors or .bin files, sharded or not.
        key: the option that named the folder, for messages.

    Raises:
        UserError: a file is missing or damaged, or the folder holds no Llama.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self.config = check_folder(folder, key)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder, key):
            content = weights.read_file(file, key)
            weights.check_tensors(content, file, key)
            for name, value in content.items():
                if not name.endswith("rotary_emb.inv_freq"):  # old files store it; it is computed today
                    self.files[name], self.shapes[name] = file, tuple(value.shape)
        for name in (*VOCABULARY_TENSORS, FINAL_NORM):
            if name not in self.shapes:
                raise UserError(f"{key}: {folder} has no tensor '{name}'; expected a Llama language model.")
            rows, vocab_size = self.shapes[name][0], self.config.get("vocab_size")
            if name != FINAL_NORM and rows != vocab_size:
                raise UserError(
                    f"{key}: '{name}' in {folder} has {rows} rows, but config.json has vocab_size {vocab_size}; the "
                    "folder mixes two versions. Take all files from one."
                )

    def read(self, name: str) -> Tensor:
        """Returns one tensor; its file is unmapped when the tensor is freed."""
        return weights.read_file(self.files[name], self.key)[name]

    def is_delta(self) -> bool:
        """Whether the final norm is that of a difference of two models."""
        return self.read(FINAL_NORM).float().abs().mean().item() < MIN_NORM


def apply_delta(base_folder: Path, delta_folder: Path, target: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the model base + delta, summed in float32 and rounded once.

    Args:
        base_folder: LLaMA as a Hugging Face folder.
        delta_folder: the delta; its configuration and tokenizer become the model's. Rows that only the delta has
            (the padding token of Vicuna v0) are copied from it.
        target: a folder that does not exist or is empty; it appears when all files are complete.
        dtype: of the written weights.

    Raises:
        UserError: the two do not match, the target is not empty, or the disk is full.
    """
    if base_folder.resolve() == delta_folder.resolve():
        raise UserError(f"--base and --delta are the same folder, {base_folder}; expected two.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--target: {target} exists and is not an empty folder; name another.")
    base, delta = WeightFolder(base_folder, "--base"), WeightFolder(delta_folder, "--delta")
    _check_match(base, delta)
    tokenizer = next((side.folder for side in (delta, base) if (side.folder / "tokenizer.model").is_file()), None)
    if tokenizer is None:
        raise UserError(f"Neither {delta_folder} nor {base_folder} has a tokenizer.model; copy it into the delta.")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_weights(base, delta, partial, dtype)
        copies = [tokenizer / name for name in TOKENIZER_FILES]
        copies += [folder / "generation_config.json" for folder in (base_folder, delta_folder)]
        for file in copies:
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        config = {name: value for name, value in delta.config.items() if name != "_name_or_path"}
        _write_json(partial / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--target: {target} cannot be written ({error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_match(base: WeightFolder, delta: WeightFolder) -> None:
    shared = [name for name in EQUAL_CONFIG_KEYS if name in base.config and name in delta.config]
    if differing := [name for name in shared if base.config[name] != delta.config[name]]:
        values = ", ".join(f"{name} {base.config[name]} and {delta.config[name]}" for name in differing)
        raise UserError(
            f"--base {base.folder} and --delta {delta.folder} are of different models: {values}. Take the same size "
            "(7B or 13B), and the first LLaMA, not Llama 2."
        )
    if only_one := sorted(base.shapes.keys() ^ delta.shapes.keys()):
        side = "--base" if only_one[0] in base.shapes else "--delta"
        raise UserError(
            f"--base and --delta differ in {len(only_one)} names; '{only_one[0]}' is only in {side}. "
            "One of them is not a plain Llama (quantised, for example), or a file is missing."
        )
    base_is_delta, delta_is_delta = base.is_delta(), delta.is_delta()
    if base_is_delta and not delta_is_delta:
        raise UserError(f"--base and --delta are swapped: {base.folder} is the delta, {delta.folder} a whole model.")
    if base_is_delta:
        raise UserError(f"--base: {base.folder} is a delta too; expected the LLaMA weights that it is to be added to.")
    if not delta_is_delta:
        raise UserError(f"--delta: {delta.folder} is a whole model, not a delta; use it as it is.")
    base_rows, rows = (side.shapes[VOCABULARY_TENSORS[0]][0] for side in (base, delta))
    if rows - base_rows not in (0, 1):
        raise UserError(
            f"--base has {base_rows} tokens and --delta {rows}; expected the same number (v1.1) or one more in the "
            "delta (v0)."
        )
    for name, shape in delta.shapes.items():
        start = 1 if name in VOCABULARY_TENSORS else 0
        if shape[start:] != base.shapes[name][start:]:
            raise UserError(f"'{name}' is {list(base.shapes[name])} in --base and {list(shape)} in --delta.")


def _write_weights(base: WeightFolder, delta: WeightFolder, folder: Path, dtype: torch.dtype) -> None:
    model = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in delta.shapes.items()}
    total = sum(value.nbytes for value in model.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise UserError(f"--target: {total:,} bytes are needed in {folder.parent}, but only {free:,} are free.")
    shards = split_torch_state_dict_into_shards(model, max_shard_size=SHARD_BYTES)
    with tqdm(total=total, unit="B", unit_scale=True, desc="base + delta") as progress:
        for file, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = _sum(base, delta, name, dtype)
                progress.update(tensors[name].nbytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _sum(base: WeightFolder, delta: WeightFolder, name: str, dtype: torch.dtype) -> Tensor:
    total = delta.read(name).to(torch.float32, copy=True)
    total[: base.shapes[name][0]] += base.read(name)
    total = total.to(dtype)
    if not total.isfinite().all():
        raise UserError(f"'{name}' of the sum is not finite in {dtype}; one of the two folders is damaged.")
    return total


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m minigpt4.tools.apply_delta", description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="LLaMA: a Hugging Face folder or a hub id")
    parser.add_argument("--delta", required=True, help="delta of the same size: a folder or a hub id")
    parser.add_argument("--target", required=True, type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the written weights (default fp16)")
    options = parser.parse_args(arguments)
    hub_files = ("*.json", "*.model", "*.bin", "*.safetensors")
    try:
        base, delta = (locate(getattr(options, side), f"--{side}", hub_files) for side in ("base", "delta"))
        target = options.target.expanduser()
        apply_delta(base, delta, target, DTYPES[options.dtype])
        rows = json.loads((target / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{target} is complete: {rows} tokens; set model.llama_model to it.")
    if rows == 32000:
        print("Note: the published MiniGPT-4 checkpoints need Vicuna v0, which has 32001 tokens.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

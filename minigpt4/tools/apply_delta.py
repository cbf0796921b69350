"""Adds a published Vicuna delta to its LLaMA base: python -m minigpt4.tools.apply_delta; see PrepareVicuna.md.

Tensors are read one at a time and written a shard at a time, so that no whole model is ever in memory.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.errors import UserError
from minigpt4.common.utils import parse_json
from minigpt4.common.weights import check_tensors, locate, read_file, shards

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 2 * 10**9  # of one written file, which is put together in memory
VOCAB_ROWS = ("model.embed_tokens.weight", "lm_head.weight")  # a row a token
FINAL_NORM = "model.norm.weight"
MAX_DELTA_NORM = 0.05  # mean size of the final norm: near 0 in a difference of two models, about 1 or more in a model
SAME_CONFIG = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps"),
)
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


class WeightFolder:
    """A Hugging Face model folder, its tensors read when asked for.

    Args:
        folder: config.json beside .safetensors or .bin files, sharded or not.
        key: the option that named the folder, for messages.

    Raises:
        UserError: a file is missing or damaged, or no Llama is in the folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self.config = self._read_json("config.json")
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._weight_files():
            for name, shape in self._shapes_in(file).items():
                if not name.endswith("rotary_emb.inv_freq"):  # computed today
                    self.files[name], self.shapes[name] = file, shape
        for name in (*VOCAB_ROWS, FINAL_NORM):
            if name not in self.shapes:
                raise UserError(f"{key}: {folder} holds no '{name}'; expected a Llama language model with its head.")
            if name != FINAL_NORM and self.shapes[name][0] != self.config.get("vocab_size"):
                raise UserError(
                    f"{key}: '{name}' in {folder} has {self.shapes[name][0]} rows, config.json says vocab_size "
                    f"{self.config.get('vocab_size')}; the folder mixes two versions."
                )

    def read(self, name: str) -> Tensor:
        """Returns one tensor; nothing of its file stays open once the tensor is gone."""
        file = self.files[name]
        if file.suffix != ".safetensors":
            return read_file(file, self.key)[name]
        with safe_open(file, framework="pt") as content:
            return content.get_tensor(name)

    def looks_like_delta(self) -> bool:
        """Whether the final norm is that of a difference."""
        return self.read(FINAL_NORM).float().abs().mean().item() < MAX_DELTA_NORM

    def _shapes_in(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix != ".safetensors":
            content = read_file(file, self.key)
            check_tensors(content, file, self.key)
            return {name: tuple(value.shape) for name, value in content.items()}
        try:
            with safe_open(file, framework="pt") as content:
                return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.key}: {file} is damaged or cut short ({error}); copy it again.") from error

    def _weight_files(self) -> list[Path]:
        for single in ("model.safetensors", "pytorch_model.bin"):
            index = f"{single}.index.json"
            if (self.folder / index).is_file():
                return shards(self.folder / index, self.key)
            if (self.folder / single).is_file():
                return [self.folder / single]
        raise UserError(
            f"{self.key}: {self.folder} holds no weights in the Hugging Face form (model.safetensors or "
            "pytorch_model.bin, or an index of shards); convert Meta's consolidated.*.pth files first."
        )

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            text = (self.folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.key}: {self.folder} has no readable {name}; give a Hugging Face folder.") from error
        content = parse_json(text, f"{self.key}: {self.folder / name}")
        if not isinstance(content, dict):
            raise UserError(f"{self.key}: {self.folder / name} is no JSON object; copy it again.")
        return content


def apply_delta(base_folder: Path, delta_folder: Path, target: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the model that is base + delta, summed in float32 and rounded once.

    Args:
        base_folder: LLaMA in the Hugging Face form.
        delta_folder: the delta; its configuration and tokenizer become the model's. Rows that only the delta has
            (the padding token of Vicuna v0) are taken as they are.
        target: a folder that does not exist or is empty; it appears once everything is written.
        dtype: of the written weights.

    Raises:
        UserError: the two do not belong together, the target is taken, or the disk is full.
    """
    if base_folder.resolve() == delta_folder.resolve():
        raise UserError(f"--base and --delta are the same folder, {base_folder}; expected two.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--target: {target} exists and is not an empty folder; name another.")
    base, delta = WeightFolder(base_folder, "--base"), WeightFolder(delta_folder, "--delta")
    _check_pair(base, delta)
    tokenizer = next((side.folder for side in (delta, base) if (side.folder / "tokenizer.model").is_file()), None)
    if tokenizer is None:
        raise UserError(f"Neither {delta_folder} nor {base_folder} has a tokenizer.model; copy it into the delta.")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_weights(base, delta, partial, dtype)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, partial / name)
        for folder in (base_folder, delta_folder):
            if (folder / "generation_config.json").is_file():
                shutil.copyfile(folder / "generation_config.json", partial / "generation_config.json")
        config = {name: value for name, value in delta.config.items() if name != "_name_or_path"}
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        _write_json(partial / "config.json", config)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--target: {target} cannot be written ({error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_pair(base: WeightFolder, delta: WeightFolder) -> None:
    both = [name for name in SAME_CONFIG if name in base.config and name in delta.config]
    if differing := [name for name in both if base.config[name] != delta.config[name]]:
        found = ", ".join(f"{name} {base.config[name]} and {delta.config[name]}" for name in differing)
        raise UserError(
            f"--base {base.folder} and --delta {delta.folder} are of different models: {found}. Take the same size "
            "(7B or 13B), and the first LLaMA, not Llama 2."
        )
    only_one = sorted(base.shapes.keys() ^ delta.shapes.keys())
    if only_one:
        where = "--base" if only_one[0] in base.shapes else "--delta"
        raise UserError(
            f"--base and --delta differ in {len(only_one)} names; '{only_one[0]}' is only in {where}. "
            "One of them is not a plain Llama (quantised, say), or lacks a file."
        )
    base_is_delta, delta_is_delta = base.looks_like_delta(), delta.looks_like_delta()
    if base_is_delta and not delta_is_delta:
        raise UserError(f"--base and --delta are swapped: {base.folder} is the delta, {delta.folder} a whole model.")
    if base_is_delta:
        raise UserError(f"--base: {base.folder} is a delta too; expected the LLaMA weights that it is to be added to.")
    if not delta_is_delta:
        raise UserError(f"--delta: {delta.folder} is a whole model, nothing to be added; use it as it is.")
    rows, base_rows = (side.shapes[VOCAB_ROWS[0]][0] for side in (delta, base))
    if rows - base_rows not in (0, 1):
        raise UserError(
            f"--base has {base_rows} tokens and --delta {rows}; expected as many (v1.1) or one more in the delta (v0)."
        )
    for name, shape in delta.shapes.items():
        start = 1 if name in VOCAB_ROWS else 0
        if shape[start:] != base.shapes[name][start:]:
            raise UserError(f"'{name}' is {list(base.shapes[name])} in --base and {list(shape)} in --delta.")


def _write_weights(base: WeightFolder, delta: WeightFolder, folder: Path, dtype: torch.dtype) -> None:
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in delta.shapes.items()}
    if (free := shutil.disk_usage(folder).free) < sum(sizes.values()):
        raise UserError(f"--target: {sum(sizes.values()):,} bytes are needed in {folder.parent}, {free:,} are free.")
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="base + delta") as progress:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = _sum(base, delta, name, dtype)
                weight_map[name] = file
                progress.update(sizes[name])
            save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _sum(base: WeightFolder, delta: WeightFolder, name: str, dtype: torch.dtype) -> Tensor:
    total = delta.read(name).to(torch.float32, copy=True)
    total[: base.shapes[name][0]] += base.read(name)
    total = total.to(dtype)
    if not total.isfinite().all():
        raise UserError(f"'{name}' of the sum is not finite in {dtype}; one of the two is damaged.")
    return total


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m minigpt4.tools.apply_delta", description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="LLaMA: a folder in the Hugging Face form, or a hub id")
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

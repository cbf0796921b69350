"""The frozen language model: a Llama-family folder, loaded by transformers and checked before it is believed."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.errors import UserError

KEY = "model.llama_model"


def load_llama(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Loads a causal LM in ``dtype``, straight from its files, every key accounted for.

    Args:
        folder: config.json beside .safetensors or .bin files (sharded or not).
        dtype: of all weights; a 7B model takes 13.5 GB in a half precision.

    Raises:
        UserError: files are missing or damaged, keys do not fit, or the folder holds a raw delta.
    """
    import transformers

    config = check_folder(folder)
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # readers of two formats, each with exceptions of their own
        cause = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{KEY}: {folder} cannot be loaded ({cause}); copy or convert it again.") from error
    # Old files carry the rotary frequencies, which are computed today; tied heads may be left out.
    unknown = [name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    missing = [
        name for name in info["missing_keys"] if not (name == "lm_head.weight" and config.get("tie_word_embeddings"))
    ]
    if missing or unknown or info["mismatched_keys"]:
        raise UserError(
            f"{KEY}: the files in {folder} do not fit its config.json: missing {sorted(missing)[:3]}, "
            f"unknown {sorted(unknown)[:3]}, other shapes {sorted(map(str, info['mismatched_keys']))[:3]}; "
            "the folder mixes two models or lacks a shard."
        )
    for name, parameter in model.named_parameters():
        if parameter.isnan().any():
            raise UserError(f"{KEY}: '{name}' in {folder} holds NaN; the files are damaged, copy them again.")
    norm = model.model.norm.weight.detach().float().abs().mean().item()
    if norm < 0.05:  # in any trained Llama the final norm scales by about 1 or more; a difference of two is near 0
        raise UserError(
            f"{KEY}: {folder} looks like a raw delta (mean of the final norm is {norm:.4f}, in a real model near 1 or "
            "above); add it to its base model first: python -m minigpt4.tools.apply_delta, see PrepareVicuna.md."
        )
    model.eval()
    model.config.use_cache = True
    return model


def check_vocabulary(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Raises UserError where the tokenizer knows ids for which the model has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{KEY}: the tokenizer in {folder} has {len(tokenizer)} tokens, the model {rows} embeddings "
            "(Vicuna v0 has 32001, v1.1 and later 32000); take both from the same version."
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Returns config.json of a model folder; raises UserError where the folder cannot be one, reading no weights."""
    if not folder.is_dir():
        raise UserError(f"{KEY}: {folder} is a file; expected the folder with config.json and the weight files.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{KEY}: {folder} has no config.json; expected a Hugging Face model folder.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for index in folder.glob("*.index.json"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if lacking := sorted(shard for shard in shards if not (folder / shard).is_file()):
                raise UserError(
                    f"{KEY}: {folder} lacks {len(lacking)} of {len(shards)} files that {index.name} names "
                    f"(first: {lacking[0]}); finish the download."
                )
    except (ValueError, KeyError) as error:
        raise UserError(f"{KEY}: a JSON file in {folder} is damaged ({error}); copy it again.") from error
    return config

"""The frozen language model: a Llama-family folder, streamed to its device and checked before it is believed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.errors import UserError, see
from minigpt4.common.fingerprints import identify
from minigpt4.common.utils import parse_json
from minigpt4.models.int8 import Int8Linear
from minigpt4.models.llama import Llama, LlamaConfig
from minigpt4.models.parallel import local_slice

KEY = "model.llama_model"


def load_llama(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
) -> Llama:
    """Loads a Llama, every key accounted for, one tensor after the other from mapped files to the device.

    Host memory holds one file's mapped pages at a time, and processes of a machine share them. On a CPU, weights that
    are in ``dtype`` already stay mapped, so that all processes together hold them once.

    Args:
        folder: config.json beside .safetensors or .bin files (sharded or not).
        dtype: of all weights; a 7B model takes 13.5 GB in a half precision.
        device: where the weights go.
        prepare: changes the built model on the meta device before its weights arrive: 8 bits, or slices over ranks.

    Raises:
        UserError: files are missing or damaged, keys do not fit, or the folder holds a raw delta.
    """
    model = build_llama(folder, dtype)
    check_weights(model, folder)
    if prepare is not None:
        prepare(model)
    _fill(model, folder, dtype, torch.device(device))
    return model.eval()


def build_llama(folder: Path, dtype: torch.dtype) -> Llama:
    """The LM that a folder's config.json describes, frozen, on the meta device; reads no weights."""
    content = check_folder(folder)
    try:
        config = LlamaConfig.of(content)
        with torch.device("meta"):
            model = Llama(config).to(dtype)
    except (ValueError, ArithmeticError, RuntimeError) as error:  # the latter: sizes beyond what a tensor can have
        cause = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{KEY}: {folder} cannot be loaded ({cause}); copy or convert it again.") from error
    return model.requires_grad_(False)


def check_weights(model: Llama, folder: Path) -> dict[str, Tensor]:
    """Every name and shape in a folder against a built model, and the final norm's values; returns the mapped tensors.

    Nothing else is read, so a wrong folder is told before its gigabytes are.

    Raises:
        UserError: names or shapes differ, or the folder holds a raw delta.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value for file in weight_files(folder) for name, value in weights.read_file(file, KEY).items()}
    # Old files carry the rotary frequencies, which are computed today.
    found = {name: value for name, value in found.items() if not str(name).endswith("rotary_emb.inv_freq")}
    unknown = sorted(map(str, found.keys() - shapes.keys()))
    misshapen = [
        f"{name} {list(getattr(value, 'shape', []))} instead of {list(shapes[name])}"
        for name, value in found.items()
        if name in shapes
        and not (weights.is_plain(value) and value.is_floating_point() and value.shape == shapes[name])
    ]
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight  # then a folder may leave out the output layer
    missing = sorted(shapes.keys() - found.keys() - ({"lm_head.weight"} if is_tied else set()))
    if missing or unknown or misshapen:
        raise UserError(
            f"{KEY}: the files in {folder} do not fit its config.json: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, other shapes {sorted(misshapen)[:3]}; "
            "the folder mixes two models or lacks a shard." + see("weights-that-do-not-fit")
        )
    norm = found["model.norm.weight"].float().abs().mean().item()
    if norm < 0.05:  # in any trained Llama the final norm scales by about 1 or more; a difference of two is near 0
        raise UserError(
            f"{KEY}: {folder} looks like a raw delta (mean of the final norm is {norm:.4f}, in a real model near 1 or "
            "above); add it to its base model first: python -m minigpt4.tools.apply_delta, see PrepareVicuna.md."
            + see("a-dead-language-model")
        )
    return found


def _fill(model: Llama, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    names, num_threads = model.state_dict().keys(), torch.get_num_threads()
    # Each worker takes whole tensors: mapped pages are read, checked and copied by several at once, and none waits for
    # another at the end of each tensor, as the threads of one operation would.
    with ThreadPoolExecutor(min(8, num_threads), initializer=_begin_worker, initargs=(device,)) as workers:
        for file in weight_files(folder):
            content = weights.read_file(file, KEY).items()
            puts = [workers.submit(_put, model, *item, dtype, device, folder) for item in content if item[0] in names]
            for put in puts:
                put.result()
    torch.set_num_threads(num_threads)  # of threads to come, as the autograd engine's
    model.tie_weights()


def _put(model: Llama, name: str, value: Tensor, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    parameter = getattr(module, leaf)
    is_sliced = hasattr(parameter, "placements")
    value = local_slice(value, parameter, device) if is_sliced else value.to(device)
    local = value.to_local() if is_sliced else value
    if local.sum().isnan():  # one pass, no copy; finite values never add up to NaN
        raise UserError(f"{KEY}: '{name}' in {folder} holds NaN; the files are damaged, copy them again." + see("nan"))
    value = value.to(dtype)
    if isinstance(module, Int8Linear) and leaf == "weight":
        module.quantize(value)
    elif isinstance(module, Int8Linear):
        module.register_buffer(leaf, value)
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _begin_worker(device: torch.device) -> None:
    torch.set_num_threads(1)
    devices.use(device)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, .safetensors before .bin; UserError where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return weights.shards(index, KEY)
    raise UserError(f"{KEY}: {folder} holds no model.safetensors or pytorch_model.bin, nor an index of their parts.")


def check_vocabulary(model: Llama, tokenizer: Any, folder: Path) -> None:
    """Raises UserError where the tokenizer knows ids for which the model has no embedding."""
    rows = model.model.embed_tokens.weight.shape[0]
    if (needed := max([len(tokenizer), *(i + 1 for i in tokenizer.all_special_ids)])) > rows:
        raise UserError(
            f"{KEY}: the tokenizer in {folder} has {needed} tokens, the model {rows} embeddings "
            "(Vicuna v0 has 32001, v1.1 and later 32000); take both from the same version."
            + see("the-wrong-vicuna-version")
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Returns config.json of a model folder; raises UserError where the folder cannot be one, reading no weights."""
    if not folder.is_dir():
        raise UserError(
            f"{KEY}: {folder} is a file ({identify(folder)}); expected the folder with config.json and the weight "
            "files of the language model." + see("weights-that-do-not-fit")
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{KEY}: {folder} has no config.json; expected a Hugging Face model folder.")
    config = parse_json((folder / "config.json").read_bytes(), f"{KEY}: {folder / 'config.json'}")
    if not isinstance(config, dict):
        raise UserError(f"{KEY}: {folder / 'config.json'} is no JSON object; copy it again.")
    for index in folder.glob("*.index.json"):
        weights.shards(index, KEY)
    weight_files(folder)
    return config

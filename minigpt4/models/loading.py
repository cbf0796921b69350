"""Files of a ``model`` section into a built ``MiniGPT4``, whose vision side and LM may be on the meta device.

Shapes and names of every file are compared before the first value is read.
"""

import fnmatch
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.config_checks import is_prompt_template
from minigpt4.common.errors import UserError, see
from minigpt4.common.files import locate
from minigpt4.common.schema import ModelConfig
from minigpt4.common.utils import IMAGE_PLACEHOLDER, decode_text
from minigpt4.models import language_model as lm
from minigpt4.models.lora import add_lora, is_lora, lora_parameters, match_lora
from minigpt4.models.parallel import shard_language_model
from minigpt4.models.quantization import quantize_layers
from minigpt4.models.vision import Q_FORMER, VIT, States, load_vision, locate_vision, q_former_state, vit_state

CKPT, PROMPTS = "model.ckpt", "model.prompt_path"
_PLAIN_EMBEDDINGS = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # others scale or change them


class ModelFiles(NamedTuple):
    """Local files of a ``model`` section; None for what it does not need."""

    llama_model: Path
    vit_weights: Path | None
    q_former_model: Path | None
    ckpt: Path | None


def locate_files(cfg: ModelConfig, has_vision: bool = True) -> ModelFiles:
    """Finds or downloads all files of the section; UserError where one is missing."""
    llama_model = locate(cfg.llama_model, lm.KEY, lm.HUB_FILES, ("*",))
    vision_files = locate_vision(cfg) if has_vision else (None, None)
    return ModelFiles(llama_model, *vision_files, locate(cfg.ckpt, CKPT) if cfg.ckpt else None)


def state_readers(model: nn.Module, files: ModelFiles) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
    """For the YAML key of each file a function that returns its memory-mapped tensors under the model's names.

    Each function compares all names and shapes with the model and raises UserError where they differ.
    """
    functions = {lm.KEY: lm.read_weights, VIT: vit_state, Q_FORMER: q_former_state, CKPT: trained_state}
    parts = (model.llama_model if files.llama_model else None, model, model, model)
    return {
        key: partial(read, part, file)
        for (key, read), part, file in zip(functions.items(), parts, files, strict=True)
        if file is not None
    }


def load_weights(
    model: nn.Module, states: States, cfg: ModelConfig, files: ModelFiles, device: torch.device, is_sharded: bool
) -> None:
    """Loads what ``state_readers`` returned, in the precisions of a run on ``device``."""
    dtype, prepare = language_model_dtype(cfg, device), _preparation(cfg, device, is_sharded)
    lm.fill_weights(model.llama_model, dict(states[lm.KEY]), dtype, device, files.llama_model, prepare)
    if files.vit_weights is not None:
        load_vision(model, states, (files.vit_weights, files.q_former_model), cfg, device)
    if model.lora:
        add_lora(model.llama_model, model.lora)
    if files.ckpt is not None:
        copy_trained_state(model, states[CKPT], files.ckpt)


def drop_language_model(model: nn.Module, states: dict[str, Mapping[str, Tensor]]) -> None:
    """Leaves the token embeddings of a built model's LM, and in ``states`` theirs, so that nothing else is loaded.

    Raises UserError for an LM whose inputs are not plain rows of the table, and for LoRA, which changes the LM.
    """
    llm = model.llama_model
    if model.lora:
        advice = "merge them (python -m minigpt4.tools.merge), and set model.llama_model to the result"
        raise UserError(f"model.lora_r is set: LoRA weights belong to the language model; {advice}.")
    if (kind := llm.config.model_type) not in _PLAIN_EMBEDDINGS:
        known = ", ".join(_PLAIN_EMBEDDINGS)
        raise UserError(f"{lm.KEY}: embeddings of type '{kind}' cannot be sent to a server; those of {known} can be.")
    name = next(name for name, module in llm.named_modules() if module is llm.get_input_embeddings())
    states[lm.KEY] = {"embed_tokens.weight": states[lm.KEY][f"{name}.weight"]}
    model.frozen_parts.remove(llm)
    model.llama_model = lm.TokenEmbeddings(llm)


def language_model_dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the LM's weights: as configured, else the device's best."""
    return devices.DTYPES[cfg.llm_dtype] if cfg.llm_dtype else devices.default_dtype(device)


def quantization(cfg: ModelConfig, device: torch.device) -> str | None:
    """The kind of quantised layers that the LM has on a device; None where they stay in half precision.

    Raises UserError if NF4 is asked for and not available.
    """
    kind = cfg.quantization
    if kind == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except Exception as error:  # it loads a library for the device, which may fail in many ways
            cause = f"needs the package bitsandbytes, which cannot be imported ({error})"
            raise UserError(f"model.llm_precision: nf4 {cause}; install it: pip install bitsandbytes.") from error
        if not devices.has_quantization(device):
            cause = f"needs kernels of bitsandbytes, which has none for {device.type} that are known to work"
            raise UserError(f"model.llm_precision: nf4 {cause}; use half, on several devices with run.parallel: fsdp.")
    return kind if devices.has_quantization(device) else None


def _preparation(cfg: ModelConfig, device: torch.device, is_sharded: bool) -> lm.Prepare | None:
    """What happens to the LM before its weights arrive: shards over ranks, quantised layers, or nothing."""
    if is_sharded:
        return partial(shard_language_model, device=device)
    if kind := quantization(cfg, device):
        return partial(quantize_layers, kind=kind)
    if cfg.quantization:
        logging.warning("8-bit weights are not supported on %s; using half precision.", device.type)
    return None


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError if a tensor of a checkpoint is not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not weights.is_finite(value):
            cause = "holds NaN or infinity; the run that wrote it had diverged." + see("nan")
            raise UserError(f"{CKPT}: '{name}' in {path} {cause}")


@torch.no_grad()
def copy_trained_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copies the tensors of ``trained_state`` into the model; UserError where one is not finite."""
    own = model.state_dict() | (lora_parameters(model.llama_model) if model.lora else {})
    check_finite(state, path)
    for name, value in state.items():
        own[name].copy_(value)
    parts = dict.fromkeys("LoRA" if is_lora(name) else name.split(".")[0] for name in state)
    logging.info("Loaded %s from %s.", " and ".join(parts), path)
    if model.lora and "LoRA" not in parts:
        variant = ": it belongs to the Llama-2 variant, whose YAML is eval_configs/minigpt4_llama2_eval.yaml"
        level, cause = (logging.INFO, "") if model.has_qformer else (logging.WARNING, variant)
        logging.log(level, "It holds no LoRA weights%s; those of this run are new.", cause)


def trained_state(model: nn.Module, path: Path, needs_lora: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in it, names and shapes compared with the model; reads no values.

    A model with LoRA accepts a checkpoint without, such as that of stage 1, except where it ``needs_lora``.
    """
    state = weights.read_state_dict(path, CKPT)
    leftovers = ("*.position_ids", "*.rotary_emb.inv_freq")  # buffers that the reference saved along
    state = {n: v for n, v in state.items() if not any(fnmatch.fnmatch(n, pattern) for pattern in leftovers)}
    weight = state.get("llama_proj.weight")
    if weight is None:
        raise UserError(
            f"{CKPT}: {path} holds no llama_proj.weight (it looks like {weights.describe_weights(state)}); expected a "
            "checkpoint of MiniGPT-4, such as checkpoint_3.pth of a stage-1 run." + see("weights-that-do-not-fit")
        )
    if weight.shape != model.llama_proj.weight.shape:
        raise UserError(_explain_projection(model, weight, path))
    own = {n: v for n, v in model.state_dict().items() if not n.startswith("llama_model.")}
    if model.lora is None and not model.has_qformer and any(map(is_lora, state)):
        cause = "holds LoRA weights and belongs to MiniGPT-v2, whose settings are in eval_configs/minigptv2_eval.yaml"
        raise UserError(f"{CKPT}: {path} {cause}; set model.arch: minigpt_v2 and model.lora_r as trained (64).")
    lora = match_lora(model.lora, state, f"{CKPT}: {path}", _lora_alpha(path), needs_lora)
    state = {name: value for name, value in state.items() if ".lora_" not in name}
    for name, value in state.items():
        is_known = name in own and value.shape == own[name].shape
        if not is_known or value.is_floating_point() != own[name].is_floating_point():
            unknown = f"'{name}' {list(value.shape)} {value.dtype} in {path} is no part of this model"
            raise UserError(f"{CKPT}: {unknown}; expected llama_proj and whatever parts were trained with it.")
    if "llama_proj.bias" not in state:
        raise UserError(f"{CKPT}: {path} holds llama_proj.weight but no llama_proj.bias; the file is incomplete.")
    return state | lora


def _lora_alpha(path: Path) -> int | None:
    """``model.lora_alpha`` of the run that wrote a checkpoint, where that is known."""
    section = weights.read_file(path, CKPT) if path.is_file() else {}
    for name in ("config", "model", "lora_alpha"):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, int) else None


def _explain_projection(model: nn.Module, weight: Tensor, path: Path) -> str:
    lm_width, q_width = model.llama_proj.weight.shape
    rows, columns = weight.shape if weight.ndim == 2 else (weight.numel(), 0)
    if columns != q_width and columns in (768, 5632):
        cause = f"It is {weights.describe_weights(weights.read_state_dict(path, CKPT))}; take the YAML of that model."
    elif rows != lm_width:
        made_for, given = (weights.LM_SIZES.get(width, f"{width} wide") for width in (rows, lm_width))
        cause = f"The projection was made for a {made_for} LM, model.llama_model is {given}: take the matching one."
    elif model.has_qformer:
        cause = "model.qformer_config describes another Q-Former than the one it was trained with."
    else:
        cause = "This model has no Q-Former; the checkpoint was trained with one, or with another model.vit_config."
    shapes = f"llama_proj.weight in {path} is {list(weight.shape)}, expected [{lm_width}, {q_width}]"
    return f"{CKPT}: {shapes}. {cause}" + see("a-projection-for-another-language-model")


def read_prompts(path: str | None, template: str) -> list[str]:
    """The lines with ``<ImageHere>`` of a prompt file, each put into the template (stage 2); none without a path.

    Raises UserError if the file is missing, no line has the placeholder, or the template has no ``{}``.
    """
    if (path or template) and not is_prompt_template(template):
        raise UserError(f"model.prompt_template is '{template}'; expected one {{}} where the prompt goes.")
    if not path:
        return []
    file = locate(path, PROMPTS)
    try:
        text = decode_text(file.read_bytes(), f"{PROMPTS}: {file}")
    except OSError as error:
        raise UserError(f"{PROMPTS}: {file} cannot be read ({error}).") from error
    lines = [line for line in text.splitlines() if IMAGE_PLACEHOLDER in line]
    if not lines:
        raise UserError(f"{PROMPTS}: no line of {file} contains {IMAGE_PLACEHOLDER}; each prompt needs it once.")
    if twice := [line for line in lines if line.count(IMAGE_PLACEHOLDER) > 1]:
        raise UserError(f"{PROMPTS}: a line of {file} has {IMAGE_PLACEHOLDER} more than once: '{twice[0][:80]}'.")
    return [template.format(line) for line in lines]


def log_summary(model: nn.Module) -> None:
    """Logs what is frozen and what is trained, a line each."""
    parts = ("visual_encoder", "ln_vision", "Qformer", "query_tokens", "llama_proj", "llama_model")
    for name in filter(lambda name: hasattr(model, name), parts):
        part: Any = getattr(model, name)
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        state = "trained" if any(p.requires_grad for p in parameters) else "frozen"
        if name == "llama_model" and model.lora:
            state = "frozen with trained LoRA"
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        logging.info("%-15s %14s parameters  %-9s %s", name, f"{sum(p.numel() for p in parameters):,}", dtypes, state)

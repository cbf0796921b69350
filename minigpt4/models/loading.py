"""Weights into a built model: the vision side from published files, the trained part from a checkpoint.

A model here is a built ``MiniGPT4``, some of whose parts may be on the meta device.
"""

import fnmatch
import logging
from pathlib import Path

import torch
from torch import nn

from minigpt4.common import weights
from minigpt4.common.errors import UserError, see
from minigpt4.common.fingerprints import kind_of
from minigpt4.models.eva_vit import interpolate_pos_embed


def load_vision(model: nn.Module, vit_file: Path, q_former_file: Path) -> None:
    """Loads the vision tower, and ln_vision, queries and Q-Former, from published files or their twins.

    The tower keeps the precision of its file until ``round_vit_weights``; the rest becomes float32.
    """
    weights.load_strictly(*tower_weights(model, vit_file))
    bridge, *rest = bridge_weights(model, q_former_file)
    weights.load_strictly(bridge, *rest)
    bridge.float()
    model.query_tokens = bridge.query_tokens
    for module in model.frozen_parts:  # assigned tensors come with their own requires_grad
        module.requires_grad_(False)
    model.query_tokens.requires_grad = model.Qformer not in model.frozen_parts


Arguments = tuple[nn.Module, dict[str, torch.Tensor], Path, str, list[str], str]


def tower_weights(model: nn.Module, vit_file: Path) -> Arguments:
    """The arguments with which ``weights.load_strictly`` fills the tower, and ``weights.fitting`` checks its file."""
    key = "model.vit_weights"
    state = weights.read_state_dict(vit_file, key)
    state = weights.published_names(state) if any(name.startswith("vision_model.") for name in state) else state
    state = {name.removeprefix("visual_encoder."): value for name, value in state.items()}
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], model.visual_encoder.pos_embed.shape[1])
    depth = len(model.visual_encoder.blocks)
    droppable = [f"blocks.{depth}.*", "norm.*", "fc_norm.*", "head.*"]  # the published file has one block more
    droppable += ["ln_vision.*", "Qformer.*", "query_tokens", "language_*"]  # a twin's file holds all parts
    hint = "Is it eva_vit_g.pth, and does model.vit_config describe it?"
    return model.visual_encoder, state, vit_file, key, droppable, hint


def bridge_weights(model: nn.Module, q_former_file: Path) -> Arguments:
    """The same for ln_vision, queries and Q-Former."""
    key = "model.q_former_model"
    state = weights.published_names(weights.read_state_dict(q_former_file, key))
    bridge = nn.ModuleDict({"ln_vision": model.ln_vision, "Qformer": model.Qformer})
    bridge.register_parameter("query_tokens", model.query_tokens)
    droppable = [
        "Qformer.bert.embeddings.word_embeddings.*",  # the text branch
        "Qformer.bert.embeddings.position_*",
        "Qformer.bert.encoder.layer.*.intermediate.dense.*",
        "Qformer.bert.encoder.layer.*.output.*",
        "Qformer.cls.*",
        *("t5_proj.*", "opt_proj.*", "llm_proj.*", "temp", "itm_head.*", "vision_proj.*", "text_proj.*"),
        *("cls_token", "pos_embed", "patch_embed.*", "blocks.*", "visual_encoder.*", "language_*"),
    ]
    hint = "Is it blip2_pretrained_flant5xxl.pth, and do model.qformer_config and num_query_token describe it?"
    return bridge, state, q_former_file, key, droppable, hint


def load_trained_part(model: nn.Module, path: Path) -> None:
    """Loads the trained part from a checkpoint of this project or of the reference."""
    state = trained_part(model, path)
    for name, value in state.items():
        if value.is_floating_point() and not weights.is_finite(value):
            raise UserError(
                f"model.ckpt: '{name}' in {path} holds NaN or infinity; the run that wrote it had diverged."
                + see("nan")
            )
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    logging.info("Loaded the projection from %s.", path)


def trained_part(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, names and shapes held against a model; reads no values."""
    key = "model.ckpt"
    state = weights.read_state_dict(path, key)
    leftovers = ("*.position_ids", "*.rotary_emb.inv_freq")  # buffers that the reference saved along
    state = {n: v for n, v in state.items() if not any(fnmatch.fnmatch(n, pattern) for pattern in leftovers)}
    weight = state.get("llama_proj.weight")
    q_width, lm_width = model.llama_proj.in_features, model.llama_proj.out_features
    if weight is None:
        raise UserError(
            f"{key}: {path} holds no llama_proj.weight (it looks like {kind_of(state)}); "
            "expected a checkpoint of MiniGPT-4, such as checkpoint_3.pth of a stage-1 run."
            + see("weights-that-do-not-fit")
        )
    if weight.shape != model.llama_proj.weight.shape:
        rows, columns = weight.shape if weight.ndim == 2 else (weight.numel(), 0)
        sizes = {4096: "7B", 5120: "13B"}
        if columns == 5632:
            cause = "It is the Llama-2 variant, which has no Q-Former and another architecture; it cannot be used."
        elif rows != lm_width:
            made_for, there = sizes.get(rows, f"{rows} wide"), sizes.get(lm_width, f"{lm_width} wide")
            cause = f"The projection was made for a {made_for} LM, model.llama_model is {there}: take the matching one."
        else:
            cause = "model.qformer_config describes another Q-Former than the one it was trained with."
        raise UserError(
            f"{key}: llama_proj.weight in {path} is {list(weight.shape)}, expected [{lm_width}, {q_width}]. {cause}"
            + see("a-projection-for-another-language-model")
        )
    own = {n: v for n, v in model.state_dict().items() if not n.startswith("llama_model.")}
    for name, value in state.items():
        fits = name in own and value.shape == own[name].shape
        if not fits or value.is_floating_point() != own[name].is_floating_point():
            raise UserError(
                f"{key}: '{name}' {list(value.shape)} {value.dtype} in {path} has no place in this model; "
                "expected llama_proj and whatever parts were trained with it."
            )
    if "llama_proj.bias" not in state:
        raise UserError(f"{key}: {path} holds llama_proj.weight but no llama_proj.bias; the file is incomplete.")
    return state


def log_summary(model: nn.Module) -> None:
    """Logs what is frozen and what is trained, a line each."""
    parts = ("visual_encoder", "ln_vision", "Qformer", "query_tokens", "llama_proj", "llama_model")
    for name in filter(lambda name: hasattr(model, name), parts):
        part = getattr(model, name)
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        state = "trained" if any(p.requires_grad for p in parameters) else "frozen"
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        logging.info("%-15s %14s parameters  %-9s %s", name, f"{sum(p.numel() for p in parameters):,}", dtypes, state)

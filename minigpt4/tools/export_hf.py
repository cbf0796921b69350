"""Writes a model as a folder of transformers' BLIP-2 classes: python -m minigpt4.tools.export_hf.

``AutoProcessor``, ``AutoModelForImageTextToText`` and ``pipeline("image-text-to-text")`` load it without this project;
``minigpt4.tools.import_hf`` restores the files that it was made of. Weights are memory-mapped and written one shard at
a time; LoRA is merged. Not expressible, and without effect on answers, is the eps of ``ln_vision`` (1e-5), as BLIP-2
has one for all norms of the vision transformer (1e-6).
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from minigpt4.common.config import Config
from minigpt4.common.device import DTYPES
from minigpt4.common.errors import UserError
from minigpt4.common.schema import LATER, ModelConfig, read_section
from minigpt4.models import MiniGPT4, loading
from minigpt4.models import language_model as lm
from minigpt4.models.lora import is_lora, lora_delta, tensor_names
from minigpt4.models.vision import Q_FORMER, VIT, q_former_state, vit_state
from minigpt4.processors import eval_image_processor
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor
from minigpt4.tools.hf_folder import check_prompts, write_card, write_origin, write_processor
from minigpt4.tools.model_folder import check_new, command, new_folder, write_json, write_shards

# A name of our own: engines that know BLIP-2 by its architecture put the image before the begin token, and would
# answer wrongly without an error; transformers goes by the model type.
ARCHITECTURE = "MiniGPT4ForConditionalGeneration"
Maker = tuple[torch.dtype, Callable[[], Tensor]]  # the dtype of a tensor, and a function that computes it
_NAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.q_bias$", r"vision_model.encoder.layers.\1.self_attn.qkv.bias"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.(.*\.(?:cross)?attention)\.self\.", r"qformer.\1.attention."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^llama_proj\.", "language_projection."),
    (r"^llama_model\.", "language_model."),
)


def export(cfg: ModelConfig, target: Path, image_processor: Any, dtype: torch.dtype | None = None) -> None:
    """Writes the model of ``cfg`` with ``cfg.ckpt`` as a Hugging Face folder, complete or not at all.

    Args:
        cfg: the section ``model``.
        target: must not exist or be empty.
        image_processor: that of chats, ``blip2_image_eval`` with its ``mean`` and ``std``.
        dtype: of the written weights, except the Q-Former's, which are then float32, as transformers computes it beside
            float16. By default every tensor keeps the dtype of its file; transformers loads them in that of the LM's.

    Raises UserError for a model that BLIP-2's classes cannot express, and where files do not match or the folder cannot
    be written.
    """
    check_new(target, "--out")
    if not cfg.has_qformer:
        raise UserError("model.has_qformer is False: transformers has no class for MiniGPT-4 without a Q-Former.")
    if type(image_processor) is not Blip2ImageEvalProcessor:
        kind = type(image_processor).__name__
        raise UserError(f"vis_processor.eval is a {kind}; transformers has a class for blip2_image_eval only.")
    files = loading.locate_files(cfg)
    model = MiniGPT4.build(cfg, files, torch.device("cpu"))
    _check_language_model(model.llama_model)
    with new_folder(target, "--out") as folder:
        conv = model.template
        processor, ends = write_processor(folder, files.llama_model, model, image_processor)
        image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        check_prompts(processor, model, image_id)
        states = _read(model, files)
        tensors = _tensors(model, states)
        embeddings = states[lm.KEY][_embedding_names(model.llama_model)[0]]
        loaded = dtype or embeddings.dtype
        rows = max(len(embeddings), image_id + 1)
        config = build_config(cfg, model, {"rows": rows, "image_id": image_id, "ends": ends, "dtype": loaded})
        shapes = _compare(config, tensors)
        extended = {f"language_model.{name}" for name in _embedding_names(model.llama_model)}
        dtypes = {name: _dtype(name, dtype) if dtype else stored for name, (stored, _) in tensors.items()}

        def make(name: str) -> Tensor:
            value = tensors[name][1]()
            if name in extended and len(value) < rows:  # the mean of all rows never has the largest logit
                new = value.float().mean(0, keepdim=True).to(value.dtype)
                value = torch.cat([value, new.expand(rows - len(value), *value.shape[1:])])
            value = value.to(dtypes[name]).contiguous()
            if not value.to(in_use := _dtype(name, loaded)).isfinite().all():
                raise UserError(f"'{name}' is not finite in {in_use}; take --dtype bfloat16 or float32.")
            return value

        write_shards(folder, {name: (shape, dtypes[name]) for name, shape in shapes.items()}, make, "--out")
        write_json(folder / "config.json", config)
        write_origin(folder, cfg, files.llama_model, image_processor, states)
        generation = {"bos_token_id": model.llama_tokenizer.bos_token_id, "eos_token_id": ends}
        generation["pad_token_id"] = model.llama_tokenizer.eos_token_id
        generation |= {"repetition_penalty": 1.05} if model.arch in LATER else {}
        write_json(folder / "generation_config.json", generation)
        write_card(folder, model, conv, files.ckpt, ends)


def _check_language_model(llm: nn.Module) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = llm.config.model_type
    if llm.config.get_text_config() is not llm.config or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{lm.KEY}: transformers' BLIP-2 cannot hold a language model of type '{kind}'; Llama's can be."
        )


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith(("qformer.", "query_tokens")) else dtype


def _embedding_names(llm: nn.Module) -> list[str]:
    """The names of the LM's tensors with a row for each token, the embeddings first."""
    parts = llm.get_input_embeddings(), llm.get_output_embeddings()
    names = {id(module): name for name, module in llm.named_modules()}
    return [f"{names[id(part)]}.{name}" for part in parts for name, _ in part.named_parameters(recurse=False)]


def _read(model: MiniGPT4, files: loading.ModelFiles) -> dict[str, dict[str, Tensor]]:
    """The memory-mapped tensors of all files by YAML key, under the model's names; all are compared with the model."""
    trained = loading.trained_state(model, files.ckpt, needs_lora=bool(model.lora))
    loading.check_finite(trained, files.ckpt)
    vision = {VIT: vit_state(model, files.vit_weights), Q_FORMER: q_former_state(model, files.q_former_model)}
    return {lm.KEY: lm.read_weights(model.llama_model, files.llama_model), **vision, loading.CKPT: trained}


def _tensors(model: MiniGPT4, states: dict[str, dict[str, Tensor]]) -> dict[str, Maker]:
    """By their names in transformers, the dtypes of a model's tensors, and functions that compute them."""
    base, trained = dict(states[lm.KEY]), states[loading.CKPT]
    embedding, *heads = _embedding_names(model.llama_model)
    for name in heads:  # tied ones are stored once, and written twice: each gets its own new row
        base.setdefault(name, base[embedding])
    state = {f"visual_encoder.{name}": value for name, value in states[VIT].items()} | states[Q_FORMER]
    state |= {name: value for name, value in trained.items() if not is_lora(name)}
    state |= {f"llama_model.{name}": value for name, value in base.items()}
    tensors: dict[str, Maker] = {}
    for name, value in state.items():
        if name.endswith("attn.q_bias"):
            tensors[_name(name)] = value.dtype, partial(_qkv_bias, value, state[name.replace("q_bias", "v_bias")])
        elif not name.endswith("attn.v_bias"):
            tensors[_name(name)] = value.dtype, partial(Tensor.contiguous, value)
    for name in model.lora.layers if model.lora else ():
        (a, b), value = (trained[part] for part in tensor_names(name)), base[f"{name}.weight"]
        tensors[f"language_model.{name}.weight"] = value.dtype, partial(_merge, value, a, b, model.lora.scaling)
    return tensors


def _qkv_bias(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return weight.float() + lora_delta(a, b, scale)


def _name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def build_config(cfg: ModelConfig, model: MiniGPT4, facts: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for transformers 4 and 5; ``facts``: ``rows``, ``image_id``, ``ends``, ``dtype``."""
    vit, q_former, tokenizer = cfg.vit_config, cfg.qformer_config, model.llama_tokenizer
    dtype = str(facts["dtype"]).removeprefix("torch.")
    text = model.llama_model.config.to_dict() | {"vocab_size": facts["rows"], "tie_word_embeddings": False}
    text |= {"eos_token_id": facts["ends"], "pad_token_id": tokenizer.eos_token_id, "dtype": dtype}
    text["bos_token_id"] = tokenizer.bos_token_id
    text.pop("_name_or_path", None)  # a folder of this machine
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:  # where transformers 4 looks for it
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "blip-2",
        "dtype": dtype,
        "image_token_index": facts["image_id"],
        "num_query_tokens": cfg.num_query_token,
        "use_decoder_only_language_model": True,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vit.embed_dim,
            "intermediate_size": int(vit.embed_dim * vit.mlp_ratio),
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.num_heads,
            "image_size": cfg.image_size,
            "patch_size": vit.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": q_former.hidden_size,
            "num_hidden_layers": q_former.num_hidden_layers,
            "num_attention_heads": q_former.num_attention_heads,
            "intermediate_size": q_former.intermediate_size,
            "cross_attention_frequency": q_former.cross_attention_freq,
            "encoder_hidden_size": vit.embed_dim,
            "layer_norm_eps": 1e-12,
        },
        "text_config": text,
    }


def _compare(config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of BLIP-2's tensors; UserError if it has others than the model."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    with init_empty_weights():
        blip2 = Blip2ForConditionalGeneration(Blip2Config(**config))
    shapes = {name: value.shape for name, value in blip2.state_dict().items()}
    if different := sorted(shapes.keys() ^ tensors.keys()):
        cause = f"{len(different)} tensors are in one of the two only (first: {different[0]})"
        raise UserError(f"{lm.KEY}: transformers' BLIP-2 does not hold this model: {cause}.")
    return shapes


@command
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m minigpt4.tools.export_hf", description=__doc__.split("\n")[0])
    parser.add_argument("--cfg-path", required=True, help="YAML file of the chat, or the config.yaml of a run")
    parser.add_argument("--options", nargs="+", help="settings that override the file: model.llama_model=FOLDER …")
    parser.add_argument("--ckpt", required=True, help="checkpoint with the projection, and LoRA if it was trained")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist or be empty")
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    parser.add_argument("--dtype", choices=sorted(names), help="of the weights; default: those of the files")
    options = parser.parse_args(arguments)
    target = options.out.expanduser()
    config = Config(options).check()
    cfg = replace(read_section(ModelConfig, config.model_cfg, "model"), ckpt=options.ckpt)
    export(cfg, target, eval_image_processor(config), names.get(options.dtype))
    print(f"{target} is complete; {target / 'README.md'} shows how to load it.")


if __name__ == "__main__":
    sys.exit(main())

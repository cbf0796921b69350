"""Every key that a YAML file may hold, with its type. What is not here is a typing error, and gets told so."""

import math
from collections.abc import Mapping
from typing import Any

from minigpt4.common.errors import UserError, nearest

Schema = dict[str, Any]  # key -> type, tuple of types, set of allowed values, or a schema of its own
NUMBER = (int, float)
PATHS = (str, list)
FREE = object  # anything, for parts that check themselves
COUNTS = (  # of which there has to be one
    *("image_size", "patch_size", "embed_dim", "depth", "num_heads", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_query_token", "max_txt_len", "batch_size_train", "batch_size_eval"),
    *("iters_per_epoch", "accum_grad_iters", "max_words"),
)

_VIT = {"patch_size": int, "embed_dim": int, "depth": int, "num_heads": int, "mlp_ratio": NUMBER}
_Q_FORMER = {
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "cross_attention_freq": int,
}
_PRECISIONS = {"fp32", "fp16", "bf16"}

MODEL: Schema = {
    "arch": str,
    "model_type": str,
    "image_size": int,
    "drop_path_rate": NUMBER,
    "use_grad_checkpoint": bool,
    "vit_model": {"eva_clip_g"},  # the only one the reference has
    "vit_precision": _PRECISIONS,
    "vit_config": _VIT,
    "vit_weights": str,
    "freeze_vit": bool,
    "freeze_qformer": bool,
    "num_query_token": int,
    "q_former_model": str,
    "qformer_config": _Q_FORMER,
    "llama_model": str,
    "llm_dtype": _PRECISIONS,
    "llm_precision": {"half", "int8"},
    "llm_grad_checkpoint": bool,
    "low_resource": bool,
    "conversation": str,
    "device_8bit": int,
    "prompt": str,
    "prompt_path": str,
    "prompt_template": str,
    "max_txt_len": int,
    "end_sym": str,
    "ckpt": str,
}
RUN: Schema = {
    "task": str,
    "runner": str,
    "lr_sched": str,
    "init_lr": NUMBER,
    "min_lr": NUMBER,
    "warmup_lr": NUMBER,
    "lr_decay_rate": NUMBER,
    "warmup_steps": int,
    "weight_decay": NUMBER,
    "beta2": NUMBER,
    "max_epoch": int,
    "iters_per_epoch": int,
    "batch_size_train": int,
    "batch_size_eval": int,
    "num_workers": int,
    "resize_on_device": bool,
    "accum_grad_iters": int,
    "clip_grad_norm": NUMBER,
    "max_nonfinite": int,
    "seed": int,
    "output_dir": str,
    "amp": bool,
    "amp_dtype": _PRECISIONS,
    "resume_ckpt_path": str,
    "resume": {"auto"},
    "compile": bool,
    "feature_cache": str,
    "feature_crops": int,
    "save_every_iters": int,
    "keep_last": int,
    "parallel": {"ddp", "fsdp"},
    "dist_timeout": NUMBER,
    "strict_device": bool,
    "evaluate": bool,
    "train_splits": list,
    "valid_splits": list,
    "test_splits": list,
    "log_freq": int,
    "tracker": {"tensorboard", "wandb"},
    "device": str,
    "world_size": int,
    "dist_url": str,
    "distributed": bool,
}
_PROCESSORS = {
    split: {
        **{"name": str, "image_size": int, "min_scale": NUMBER, "max_scale": NUMBER},
        **{"mean": list, "std": list, "draft": bool},
    }
    for split in ("train", "eval")
}
_TEXT_PROCESSORS = {split: {"name": str, "prompt": str, "max_words": int} for split in ("train", "eval")}
_BUILD_INFO = {"storage": PATHS, "val_storage": PATHS, "test_storage": PATHS, "shuffle_buffer": int}
DATASET: Schema = {
    "data_type": str,
    "build_info": _BUILD_INFO,
    "vis_processor": _PROCESSORS,
    "text_processor": _TEXT_PROCESSORS,
    "sample_ratio": NUMBER,
}
PREPROCESS: Schema = {"vis_processor": _PROCESSORS, "text_processor": _TEXT_PROCESSORS}


def check(section: Mapping[str, Any], schema: Schema, where: str, source: str) -> None:
    """Holds a section against its schema.

    Args:
        section: plain containers.
        schema: see above; a value of None is always allowed.
        where: the section's dotted name, for messages.
        source: the YAML file, for messages.

    Raises:
        UserError: an unknown key (with its nearest known neighbour), a value of another type, or a number below 0.
    """
    if not isinstance(section, Mapping):
        raise UserError(f"{source}: {where} is {section!r}; expected a section with {', '.join(schema)}.")
    for name, value in section.items():
        key = f"{where}.{name}"
        if name not in schema:
            raise UserError(f"{source}: there is no key {key}.{nearest(str(name), schema)} Known: {', '.join(schema)}.")
        expected = schema[name]
        if value is None or expected is FREE:
            continue
        if isinstance(expected, dict):
            check(value, expected, key, source)
        elif isinstance(expected, set):
            if value not in list(expected):  # in a set, a list or a section would not even be looked up
                raise UserError(f"{source}: {key} is {value!r}; expected one of {', '.join(sorted(expected))}.")
        else:
            types = expected if isinstance(expected, tuple) else (expected,)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                names = " or ".join(t.__name__ for t in types)
                raise UserError(f"{source}: {key} is {value!r} ({type(value).__name__}); expected {names}.")
            least = 1 if name in COUNTS else -1 if name == "warmup_lr" else 0  # a warm-up from -1 is none
            if isinstance(value, int | float) and not least <= value < math.inf:
                raise UserError(f"{source}: {key} is {value!r}; expected {least} or more.")

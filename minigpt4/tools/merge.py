"""Merges a checkpoint's LoRA weights into its language model: python -m minigpt4.tools.merge.

The files are memory-mapped and written one shard at a time. The sums are computed in float32 and rounded once to the
precision of the files, whatever precision the run had.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.models import MiniGPT4, loading
from minigpt4.models import language_model as lm
from minigpt4.models.lora import is_lora, lora_delta, tensor_names
from minigpt4.tools.model_folder import check_new, command, copy_settings, new_folder, write_shards

CHECKPOINT = "checkpoint.pth"  # beside the model: what else was trained


def merge(cfg: ModelConfig, target: Path) -> None:
    """Writes the language model of ``cfg`` with the LoRA weights of ``cfg.ckpt``, and the rest of that in a checkpoint.

    ``target`` must not exist or be empty; it appears when all files are complete. Raises UserError if the configuration
    or the checkpoint has no LoRA, if files do not match, or if the target cannot be written.
    """
    check_new(target, "--out")
    if not cfg.lora_r:
        raise UserError("model.lora_r is 0: there is nothing to merge; take the configuration of the run.")
    files = loading.locate_files(cfg, has_vision=False)
    model = MiniGPT4.build(cfg, files, torch.device("cpu"))
    base = lm.read_weights(model.llama_model, files.llama_model)
    state = loading.trained_state(model, files.ckpt, needs_lora=True)
    loading.check_finite(state, files.ckpt)
    merged = {f"{name}.weight": tensor_names(name) for name in model.lora.layers}

    def make(name: str) -> Tensor:
        value = base[name]
        if name not in merged:
            return value.contiguous()
        a, b = (state[part] for part in merged[name])
        total = (value.float() + lora_delta(a, b, model.lora.scaling)).to(value.dtype)
        if not total.isfinite().all():
            raise UserError(f"'{name}' of the sum is not finite in {value.dtype}; the run had diverged.")
        return total

    with new_folder(target, "--out") as folder:
        write_shards(folder, {name: (value.shape, value.dtype) for name, value in base.items()}, make, "--out")
        copy_settings(files.llama_model, folder)
        rest = {name: value.clone() for name, value in state.items() if not is_lora(name)}
        torch.save({"model": rest}, folder / CHECKPOINT)


@command
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m minigpt4.tools.merge", description=__doc__.split("\n")[0])
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run, or the config.yaml that it wrote")
    parser.add_argument("--options", nargs="+", help="settings that override the file: model.llama_model=FOLDER …")
    parser.add_argument("--ckpt", required=True, help="checkpoint of the run with LoRA")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist or be empty")
    options = parser.parse_args(arguments)
    target = options.out.expanduser()
    cfg = read_section(ModelConfig, Config(options).check().model_cfg, "model")
    merge(replace(cfg, ckpt=options.ckpt), target)
    print(f"{target} is complete. Set model.llama_model to it and model.ckpt to {target / CHECKPOINT}, and remove")
    print("model.lora_r, lora_alpha, lora_dropout and lora_target_modules.")


if __name__ == "__main__":
    sys.exit(main())

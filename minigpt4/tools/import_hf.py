"""Restores the files of an exported folder, with a YAML file that names them: python -m minigpt4.tools.import_hf.

The tensors are those of the original files to the bit unless the export narrowed their precision: all that the model
uses, the language model without the row that was added for ``<image>``. Its other files are the original ones.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.utils import read_json_object
from minigpt4.models import MiniGPT4, loading
from minigpt4.models import language_model as lm
from minigpt4.models.loading import CKPT
from minigpt4.models.vision import Q_FORMER, VIT
from minigpt4.tools.hf_folder import ORIGIN, ORIGINAL_LM
from minigpt4.tools.model_folder import check_new, command, copy_settings, new_folder, save_tensors, write_shards

KEY = "DIR"
FILES = {lm.KEY: "llama_model", VIT: "eva_vit.safetensors", Q_FORMER: "qformer.safetensors", CKPT: "checkpoint.pth"}
YAML = "chat.yaml"


def import_folder(source: Path, target: Path) -> list[str]:
    """Writes the files that ``source`` was exported from, and a YAML file of a chat; returns what is not as it was.

    ``target`` must not exist or be empty; it appears when all files are complete and match the model. Raises UserError
    if ``source`` was not written by ``export_hf``, a file is missing or damaged, or the target cannot be written.
    """
    check_new(target, "--out")
    origin = read_json_object(source / ORIGIN, KEY)
    if not {"model", "vis_processor", "dtypes", "ckpt", "has_merged_lora"} <= origin.keys():
        advice = "name it in model.vit_weights and model.q_former_model, or export it again"
        raise UserError(f"{KEY}: {source} has no {ORIGIN} as export_hf writes it; {advice}.")
    states = restored(weights.read_state_dict(source, KEY), source, origin["ckpt"])
    dtypes = {key: _original_dtype(state, origin["dtypes"][key]) for key, state in states.items()}

    def make(key: str, name: str) -> Tensor:
        value = states[key][name]
        return value.to(dtypes[key] or value.dtype).contiguous()

    with new_folder(target, "--out") as folder:
        copy_settings(source / ORIGINAL_LM, folder / FILES[lm.KEY])
        shapes = {name: (value.shape, dtypes[lm.KEY] or value.dtype) for name, value in states[lm.KEY].items()}
        write_shards(folder / FILES[lm.KEY], shapes, partial(make, lm.KEY), "--out")
        for key in (VIT, Q_FORMER):
            save_tensors({name: make(key, name) for name in states[key]}, folder / FILES[key])
        torch.save({"model": {name: make(CKPT, name).clone() for name in states[CKPT]}}, folder / FILES[CKPT])
        _check(origin["model"] | _paths(folder))
        _write_yaml(folder / YAML, origin["model"] | _paths(target.resolve()), origin["vis_processor"])
    return _differences(states, dtypes, origin)


def restored(state: Mapping[str, Tensor], source: Path, trained: list[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a folder as those of the original files, by YAML key; ``trained`` are those of the checkpoint."""
    prefix = "language_model."
    llm = lm.build_language_model(source / ORIGINAL_LM, torch.float32)
    own = {id(value): name for name, value in reversed(llm.state_dict(keep_vars=True).items())}  # tied ones once
    rows = {name: len(llm.get_parameter(name)) for name in own.values()}
    parts: dict[str, dict[str, Tensor]] = {lm.KEY: {}, VIT: {}, Q_FORMER: {}, CKPT: {}}
    vision = {}
    for name, value in state.items():
        if (short := name.removeprefix(prefix)) in rows and short != name:
            parts[lm.KEY][short] = value[: rows[short]]
        elif name.startswith("language_projection."):
            parts[CKPT][f"llama_proj.{name.rpartition('.')[2]}"] = value
        elif not name.startswith(prefix):
            vision[name] = value
    for name, value in weights.published_names(vision).items():
        parts[Q_FORMER if name.startswith(("ln_vision.", "Qformer.", "query_tokens")) else VIT][name] = value
    everything = parts[CKPT] | parts[Q_FORMER] | {f"visual_encoder.{n}": value for n, value in parts[VIT].items()}
    if missing := [*(name for name in trained if name not in everything), *(rows.keys() - parts[lm.KEY].keys())]:
        raise UserError(f"{KEY}: {source} has no tensor from which '{missing[0]}' could be restored; copy it again.")
    parts[CKPT] = {name: everything[name] for name in trained}
    return parts


def _original_dtype(state: Mapping[str, Tensor], original: Sequence[str]) -> torch.dtype | None:
    """The dtype of the original tensors, if the exported ones, perhaps of a wider one, hold the same numbers."""
    dtype = getattr(torch, original[0].removeprefix("torch."))
    is_exact = len(original) == 1 and all(torch.promote_types(dtype, v.dtype) == v.dtype for v in state.values())
    return dtype if is_exact else None


def _write_yaml(file: Path, model: Mapping[str, Any], images: Mapping[str, Any]) -> None:
    content: dict[str, Any] = {"model": dict(model)}
    if images:  # settings of the image processor other than the default ones
        section = {"name": "blip2_image_eval", "image_size": model["image_size"], **images}
        content["datasets"] = {"cc_sbu_align": {"vis_processor": {"train": section, "eval": dict(section)}}}
    content["run"] = {"task": "image_text_pretrain"}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    file.write_text(f"# Chat with the imported model.\n{text}", encoding="utf-8")


def _paths(folder: Path) -> dict[str, str]:
    return {key.removeprefix("model."): str(folder / name) for key, name in FILES.items()}


def _check(section: Mapping[str, Any]) -> None:
    """Compares the written files with the model, as every run does."""
    cfg = read_section(ModelConfig, section, "model")
    files = loading.locate_files(cfg)
    for read in loading.state_readers(MiniGPT4.build(cfg, files, torch.device("cpu")), files).values():
        read()


def _differences(
    states: Mapping[str, Mapping[str, Tensor]], dtypes: Mapping[str, torch.dtype | None], origin: Mapping[str, Any]
) -> list[str]:
    sentences = []
    for key, state in states.items():
        was, now = origin["dtypes"][key], sorted({str(dtypes[key] or value.dtype) for value in state.values()})
        if was != now:
            change = f"{', '.join(now)} here, as they were exported, and {', '.join(was)} in the original files"
            sentences.append(f"{key}: weights are {change}; they are not equal to the bit.".replace("torch.", ""))
    if origin["has_merged_lora"]:
        sentences.append(f"{lm.KEY}: the LoRA weights of the run are merged into it and cannot be taken apart.")
    return sentences


@command
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m minigpt4.tools.import_hf", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar=KEY, help="folder that export_hf wrote, or a Hugging Face id of one")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist or be empty")
    options = parser.parse_args(arguments)
    target = options.out.expanduser()
    differences = import_folder(locate(options.source, KEY), target)
    print(f"{target} is complete; {target / YAML} names its files: python demo.py --cfg-path {target / YAML}")
    for sentence in differences:
        print(sentence)


if __name__ == "__main__":
    sys.exit(main())

"""Files of weights: where they are, what is in them, and whether they are what the model needs.

Nothing is loaded half: every key and shape of a file is accounted for, or a UserError says what differs.
"""

import fnmatch
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import UserError, see
from minigpt4.common.files import WEIGHT_FILES
from minigpt4.common.utils import parse_json

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OTHERS = (torch.int64, torch.int32, torch.bool)  # buffers that were saved along
LM_SIZES = {4096: "7B", 5120: "13B", 6656: "30B", 8192: "65B"}  # by hidden width
VOCABULARIES = {32001: "Vicuna v0", 32000: "LLaMA, or Vicuna from v1.1 on"}
_STARTS = (  # what names begin with -> what such a file is; the first that fits
    (("tok_embeddings.", "layers.0.attention.wq"), "LLaMA in Meta's own form, which has to be converted first"),
    (("transformer.h.", "gpt_neox.", "model.decoder.layers."), "a language model that is no Llama"),
    (("encoder.block.", "decoder.block."), "a T5 language model"),
    (("Qformer.", "query_tokens"), "BLIP-2's Q-Former (blip2_pretrained_*.pth)"),
    (("qformer.", "vision_model.encoder.layers.0.self_attn.qkv"), "BLIP-2 in the form of Hugging Face"),
    (("vision_model.", "text_model.", "visual.transformer."), "a CLIP model"),
)


def shards(index: Path, key: str) -> list[Path]:
    """The files that a Hugging Face index names, all of them beside it.

    Raises:
        UserError: the index is damaged, names a file elsewhere, or one that is not there.
    """
    content = parse_json(index.read_bytes(), f"{key}: {index}")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{key}: {index} has no weight_map; copy it again.")
    names = sorted(set(map(str, weight_map.values())))
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise UserError(f"{key}: {index} names '{elsewhere[0]}'; expected files beside it. Copy it again.")
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise UserError(
            f"{key}: {len(missing)} of {len(names)} files that {index.name} names are missing in {index.parent} "
            f"(first: {missing[0]}); finish the download."
        )
    return [index.parent / name for name in names]


def read_file(path: Path, key: str) -> dict:
    """Reads one .pth, .pt, .bin or .safetensors file, memory-mapped, to the CPU; pickles may hold tensors only.

    Raises:
        UserError: the file is damaged, of another type, or a pickle that would run code.
    """
    if not path.is_file():
        raise UserError(f"{key}: {path} is no file; expected one of {', '.join(WEIGHT_FILES)}.")
    try:
        if path.suffix not in WEIGHT_FILES:
            raise UserError(f"{key}: {path} is no weight file; expected one of {', '.join(WEIGHT_FILES)}.")
        content = _load(path)
    except UserError:
        raise
    except Exception as error:  # the readers' own, of many kinds
        cause = _describe_bytes(path) or str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"{key}: {path} ({path.stat().st_size:,} bytes) cannot be read as weights ({cause}); "
            "it is damaged, cut short, or not a plain file of tensors. Copy or download it again."
            + see("damaged-files")
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds a {type(content).__name__}; expected a dict of tensors.")
    return content


def read_state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """Reads the tensors of a file, or of all files of a Hugging Face folder.

    A {"model": …} wrapper, as BLIP-2 and MiniGPT-4 files have it, is opened.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise UserError(f"{key}: the folder {path} holds no .safetensors or .bin file.")
        parts = [read_file(file, key) for file in files]
    else:
        parts = [read_file(path, key)]
    parts = [part["model"] if isinstance(part.get("model"), Mapping) else part for part in parts]
    state = {name: value for part in parts for name, value in part.items()}
    check_tensors(state, path, key)
    return state


def check_tensors(state: Mapping[str, Any], path: Path, key: str) -> None:
    """Raises UserError where something in ``state`` is no plain tensor with a name."""
    for name, value in state.items():
        if not isinstance(name, str) or not is_plain(value):
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{key}: {path} holds '{name}', which is no tensor of plain numbers ({kind}); "
                "expected a dict of parameter names to tensors."
            )


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of usual numbers that are all there; a file may also describe others."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in _FLOATS + _OTHERS
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str, droppable: Iterable[str] = (), hint: str = ""
) -> None:
    """Loads a state dict into a module, all of it or not at all; arguments and errors as for ``match_state_dict``."""
    assign(module, match_state_dict(module, state, path, key, droppable, hint), path, key)


def assign(module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str) -> None:
    """Makes matched tensors the parameters of a module, without a copy; UserError where a value is not finite."""
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            raise UserError(
                f"{key}: '{name}' in {path} holds NaN or infinity; the file is damaged or comes from a diverged run."
                + see("nan")
            )


def match_state_dict(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str, droppable: Iterable[str] = (), hint: str = ""
) -> dict[str, Tensor]:
    """The tensors of a state dict that a module needs, every key and shape of both accounted for; reads no values.

    Args:
        module: may be on the meta device.
        state: names to tensors.
        path: the file, for messages.
        key: the YAML key that named the file, for messages.
        droppable: name patterns that the file may hold and the module does not need.
        hint: the likely cause of a difference, added to the message.

    Raises:
        UserError: a key is missing or unknown, or a shape differs.
    """
    droppable = list(droppable)
    expected = module.state_dict()
    found = {
        name: value
        for name, value in state.items()
        if name in expected or not any(fnmatch.fnmatch(name, pattern) for pattern in droppable)
    }
    problems = [
        f"'{name}' is {list(found[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    problems += [
        f"'{name}' is {found[name].dtype} in the file and {value.dtype} in the model"
        for name, value in expected.items()
        if name in found and found[name].is_floating_point() != value.is_floating_point()
    ]
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} of {len(expected)} expected keys are missing ({_some(missing)})")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"{len(unknown)} keys are unknown to the model ({_some(unknown)})")
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise UserError(
            f"{key}: {path} does not match the model: {'; '.join(problems[:3])}{more}. "
            f"It looks like {describe_weights(state)}."
            + (f" {hint}" if hint else "")
            + see("weights-that-do-not-fit")
        )
    return found


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass that writes nothing: both extremes would show it."""
    return not value.numel() or bool(torch.stack(value.detach().aminmax()).isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


_TWIN_RULES = (  # Hugging Face name -> published name, for Salesforce/blip2-*
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.(.*\.(?:cross)?attention)\.attention\.", r"Qformer.bert.\1.self."),
    (r"^qformer\.", "Qformer.bert."),
)


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of the Hugging Face BLIP-2 twins to the names of the published files; others pass through."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _TWIN_RULES:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        if name.endswith("attn.qkv.bias") and value.ndim == 1 and len(value) % 3 == 0 and len(value):
            # (q, 0, v): the key bias is zero by design
            q_bias, _, v_bias = value.chunk(3)
            block = name.removesuffix("qkv.bias")
            renamed |= {f"{block}q_bias": q_bias, f"{block}v_bias": v_bias}
        else:
            renamed[name] = value
    return renamed


def describe_weights(content: Mapping[str, Any]) -> str:
    """What a file of weights is, as "a …"; ``content`` maps names to tensors, perhaps within {"model": …}."""
    state = content["model"] if isinstance(content.get("model"), Mapping) else content
    shapes = {str(name): list(getattr(value, "shape", ())) for name, value in state.items()}
    if any(".lora_A" in name for name in shapes):
        return "a LoRA adapter, which has to be merged into its base model first"
    if projection := shapes.get("llama_proj.weight"):
        if projection[-1] == 5632:
            return "a MiniGPT-4 checkpoint of the Llama-2 variant, which has no Q-Former"
        return f"a MiniGPT-4 checkpoint for a {LM_SIZES.get(projection[0], f'{projection[0]} wide')} LM (model.ckpt)"
    if any(name.startswith(("model.embed_tokens.", "model.layers.")) for name in shapes):
        rows, width = (*shapes.get("model.embed_tokens.weight", ()), 0, 0)[:2]
        size = f" {LM_SIZES.get(width, f'{width} wide')}, vocabulary {rows}" if rows else ", one part of several"
        owner = f" ({VOCABULARIES[rows]})" if rows in VOCABULARIES else ""
        return f"a Llama language model{size}{owner}"
    for starts, kind in _STARTS:
        if any(name.startswith(starts) for name in shapes):
            return kind
    blocks = {name.removeprefix("visual_encoder.").split(".")[1] for name in shapes if "blocks." in name}
    if blocks and (tower := shapes.get("pos_embed") or shapes.get("visual_encoder.pos_embed")):
        is_eva = tower[-1] == 1408 and len(blocks) in (39, 40)
        return f"a vision transformer of {len(blocks)} blocks, {tower[-1]} wide" + (
            " (eva_vit_g.pth)" if is_eva else ""
        )
    return f"a file of {', '.join(sorted(shapes)[:3])}" if shapes else "a file without tensors"


def _describe_bytes(path: Path) -> str | None:
    """What a file is that only has the name of one of weights; None where its first bytes do not tell."""
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs in place of the file: git lfs pull"
    if head[:1] == b"<":
        return "it is a web page, saved in place of the file"
    return None if head else "it is empty"


def _load(path: Path, device: str = "cpu") -> Any:
    """What a file of weights holds, memory-mapped; pickles may hold tensors only, and archives no more than their size.

    Raises:
        Exception: zip, pickle and safetensors readers each have exceptions of their own.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch compresses nothing
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than it holds")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location=device, weights_only=True)  # files of before torch 1.6


def identify_file(path: Path) -> str:
    """``describe_weights`` for a file on the disk, whatever it is; its tensors stay unread."""
    if not path.is_file():
        return "no plain file"
    try:
        content = _load(path, "meta")
        return describe_weights(content) if isinstance(content, Mapping) else f"a {type(content).__name__}"
    except Exception:  # not to know is an answer
        return _describe_bytes(path) or "no file of weights"

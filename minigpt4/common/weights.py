"""Weight files: reading them, matching every key and shape with a module, and describing what they hold."""

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common import pickles
from minigpt4.common.errors import UserError, see
from minigpt4.common.files import WEIGHT_FILES, WEIGHTS, shard_names

_NUMBERED = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})(\.\w+)")  # the name of a shard
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
LM_SIZES = {4096: "7B", 5120: "13B", 6656: "30B", 8192: "65B"}  # by hidden width
VOCABULARIES = {32001: "Vicuna v0", 32000: "LLaMA, or Vicuna from v1.1 on"}
# By width of the projection's input and whether there is LoRA: what a checkpoint is, and the YAML file of its chat.
_MEMBERS = {
    (768, False): ("MiniGPT-4", "minigpt4_eval.yaml"),
    (5632, False): ("the Llama-2 variant of MiniGPT-4", "minigpt4_llama2_eval.yaml"),
    (5632, True): ("MiniGPT-v2", "minigptv2_eval.yaml"),
}
_DERIVATIVES = (("video_Qformer.", "video_query_tokens"), ("llama_proj2.",), ("audio_",))  # with parts of their own
_KINDS = (  # prefixes of names -> what such a file is; the first that matches
    (("tok_embeddings.", "layers.0.attention.wq"), "LLaMA in Meta's own form, which has to be converted first"),
    (("transformer.h.", "gpt_neox.", "model.decoder.layers."), "a language model that is no Llama"),
    (("encoder.block.", "decoder.block."), "a T5 language model"),
    (("Qformer.", "query_tokens"), "BLIP-2's Q-Former (blip2_pretrained_*.pth)"),
    (("qformer.", "vision_model.encoder.layers.0.self_attn.qkv"), "BLIP-2 in the form of Hugging Face"),
    (("vision_model.", "text_model.", "visual.transformer."), "a CLIP model"),
)
_BLIP2_NAMES = (  # pattern of a Hugging Face name, published name; for Salesforce/blip2-*
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.(?:self_)?(attn\.qkv|mlp)\.", r"blocks.\1.\2."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.(?:embeddings\.)?layernorm\.", "Qformer.bert.embeddings.LayerNorm."),  # the longer one: InstructBLIP
    (r"^qformer\.(.*\.(?:cross)?attention)\.attention\.", r"Qformer.bert.\1.self."),
    (r"^qformer\.", "Qformer.bert."),
)


def weight_files(folder: Path, key: str, tensors: Sequence[str] = ("*",)) -> list[Path]:
    """The files of a Hugging Face folder that hold the tensors whose names match a pattern, .safetensors before .bin.

    An index whose shards are missing counts only where no other file holds the weights: it may be left over. Raises
    UserError where there are none, or some of them are missing.
    """
    problems = []
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        try:
            if index.is_file():
                return shards(index, key, tensors)
        except UserError as error:
            problems.append(error)
    files = [] if problems else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        expected = "model.safetensors or pytorch_model.bin, nor an index of their parts"
        raise problems[0] if problems else UserError(f"{key}: {folder} holds no {expected}.")
    if number := _NUMBERED.fullmatch(files[0].name):  # shards of which not even the index is here
        name, digits, total, suffix = number.groups()
        names = (f"{name}-{i:0{len(digits)}}-of-{total}{suffix}" for i in range(1, int(total) + 1))
        if missing := next((name for name in names if folder / name not in files), None):
            raise UserError(
                f"{key}: {missing}, one of {int(total)} files, is missing in {folder}; finish the download."
            )
    return files


def shards(index: Path, key: str, tensors: Sequence[str] = ("*",)) -> list[Path]:
    """The files that a Hugging Face index names for wanted tensors; UserError if it is damaged, or one is missing."""
    names = shard_names(index, key, tensors)
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        share = f"{len(missing)} of {len(names)} files that {index.name} names are missing in {index.parent}"
        raise UserError(f"{key}: {share} (first: {missing[0]}); finish the download.")
    return [index.parent / name for name in names]


def read_file(path: Path, key: str) -> dict:
    """Reads one weight file, memory-mapped, to the CPU; UserError if it is damaged or would run code."""
    if not path.is_file() or path.suffix not in WEIGHT_FILES:
        raise UserError(f"{key}: {path} is no weight file; expected one of {', '.join(WEIGHT_FILES)}.")
    try:
        content = _load(path)
    except Exception as error:  # zip, pickle and safetensors readers each have errors of their own
        cause = _describe_bytes(path) or str(error).strip().split("\n")[0][:160]
        text = f"{key}: {path} ({path.stat().st_size:,} bytes) cannot be read as weights ({cause}); it is damaged, "
        text += "cut short, or not a plain file of tensors. Copy or download it again." + see("damaged-files")
        raise UserError(text) from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds a {type(content).__name__}; expected a dict of tensors.")
    return content


def read_state_dict(path: Path, key: str, tensors: Sequence[str] = ("*",)) -> dict[str, Tensor]:
    """Reads the tensors of a file, or of a Hugging Face folder's ``weight_files``; opens a {"model": …} wrapper."""
    state: dict[str, Tensor] = {}
    for file in weight_files(path, key, tensors) if path.is_dir() else [path]:
        content = read_file(file, key)
        state |= content["model"] if isinstance(content.get("model"), Mapping) else content
    check_tensors(state, path, key)
    return state


def check_tensors(state: Mapping[str, Any], path: Path, key: str) -> None:
    """Raises UserError if something in ``state`` is no plain tensor with a name."""
    for name, value in state.items():
        if not isinstance(name, str) or not is_plain(value):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            expected = "expected a dict of parameter names to tensors"
            raise UserError(f"{key}: {path} holds '{name}', which is no tensor of plain numbers ({kind}); {expected}.")


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of a usual dtype whose numbers are all stored."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return is_dense and value.dtype in _DTYPES and value.nbytes <= value.untyped_storage().nbytes()


def assign(module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str) -> None:
    """Makes matched tensors the parameters of a module, without a copy; UserError if a value is not finite."""
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            cause = "the file is damaged or comes from a diverged run." + see("nan")
            raise UserError(f"{key}: '{name}' in {path} holds NaN or infinity; {cause}")


def match_state_dict(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str, droppable: Iterable[str] = (), hint: str = ""
) -> dict[str, Tensor]:
    """Returns the tensors that a module, perhaps on the meta device, needs of a state dict; reads no values.

    Names that match a pattern of ``droppable`` may be in the file alone; ``hint`` names a likely cause. UserError if a
    name is missing or unknown, or if a shape or the kind of numbers differs.
    """
    patterns, expected = list(droppable), module.state_dict(keep_vars=True)  # tied parameters are one object
    actual = {n: v for n, v in state.items() if n in expected or not any(fnmatch.fnmatch(n, p) for p in patterns)}
    problems = [
        f"'{name}' is {list(given.shape)} {given.dtype} in the file and {list(own.shape)} {own.dtype} in the model"
        for name, own in expected.items()
        if (given := actual.get(name, own)).shape != own.shape or given.is_floating_point() != own.is_floating_point()
    ]
    stored = {id(expected[name]) for name in actual if name in expected}  # of tied ones, one is enough
    if missing := [name for name, own in expected.items() if id(own) not in stored]:
        problems.append(f"{len(missing)} of {len(expected)} expected keys are missing ({', '.join(missing[:3])})")
    if unknown := [name for name in actual if name not in expected]:
        problems.append(f"{len(unknown)} keys are unknown to the model ({', '.join(unknown[:3])})")
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        advice = f"It looks like {describe_weights(state)}. {hint}".rstrip() + see("weights-that-do-not-fit")
        raise UserError(f"{key}: {path} does not match the model: {'; '.join(problems[:3])}{more}. {advice}")
    return actual


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass without a copy, as both extremes would show it."""
    return not value.numel() or bool(torch.stack(value.detach().aminmax()).isfinite().all())


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of Hugging Face's BLIP-2 to the names of the published files; keeps other names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _BLIP2_NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.endswith("attn.qkv.bias") or value.ndim != 1 or not len(value) or len(value) % 3:
            renamed[name] = value
        else:
            block, (q_bias, _, v_bias) = name.removesuffix("qkv.bias"), value.chunk(3)  # the key bias is zero by design
            renamed |= {f"{block}q_bias": q_bias, f"{block}v_bias": v_bias}
    return renamed


def describe_weights(content: Mapping[str, Any]) -> str:
    """Returns what a weight file is, as "a …"; ``content`` maps names to tensors, perhaps within {"model": …}."""
    state = content["model"] if isinstance(content.get("model"), Mapping) else content
    shapes = {str(name): list(getattr(value, "shape", ())) for name, value in state.items()}
    has_lora = any(".lora_A" in name for name in shapes)
    if has_lora and "llama_proj.weight" not in shapes:
        return "a LoRA adapter, which has to be merged into its base model first"
    if projection := shapes.get("llama_proj.weight"):
        size = f"{LM_SIZES.get(projection[0], f'{projection[0]} wide')} LM{' with LoRA' * has_lora}"
        if any(name.startswith(prefixes) for prefixes in _DERIVATIVES for name in shapes):
            return (
                f"a checkpoint of a model derived from MiniGPT-4 for a {size}, with parts that MiniGPT-4 does not have"
            )
        member, yaml = _MEMBERS.get((projection[-1], has_lora and projection[-1] == 5632), ("MiniGPT-4", ""))
        advice = f"; eval_configs/{yaml} has its settings" * (projection[-1] == 5632)
        return f"a checkpoint of {member} for a {size} (model.ckpt{advice})"
    if any(name.startswith(("model.embed_tokens.", "model.layers.")) for name in shapes):
        rows, width = (*shapes.get("model.embed_tokens.weight", ()), 0, 0)[:2]
        size = f" {LM_SIZES.get(width, f'{width} wide')}, vocabulary {rows}" if rows else ", one part of several"
        return f"a Llama language model{size}" + (f" ({VOCABULARIES[rows]})" if rows in VOCABULARIES else "")
    for prefixes, kind in _KINDS:
        if any(name.startswith(prefixes) for name in shapes):
            return kind
    if tower := shapes.get("pos_embed") or shapes.get("visual_encoder.pos_embed"):
        blocks = {name.removeprefix("visual_encoder.").split(".")[1] for name in shapes if "blocks." in name}
        file = " (eva_vit_g.pth)" if tower[-1] == 1408 else ""
        return f"a vision transformer of {len(blocks)} blocks, {tower[-1]} wide{file}"
    return f"a file of {', '.join(sorted(shapes)[:3])}" if shapes else "a file without tensors"


def identify_file(path: Path) -> str:
    """``describe_weights`` for a path of any kind."""
    try:
        return describe_weights(read_file(path, "file"))
    except UserError:
        return (path.is_file() and _describe_bytes(path)) or "no file of weights"


def _describe_bytes(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; run: git lfs pull"
    if head.startswith(b"<"):
        return "it is a web page, saved in place of the file"
    return None if head else "it is empty"


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    is_zip = pickles.check(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)

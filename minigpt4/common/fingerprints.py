"""Which file is this really? Told by the names and shapes in it, never by its own name."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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


def kind_of(content: Mapping[str, Any]) -> str:
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


def kind_of_bytes(path: Path) -> str | None:
    """What a file is that only has the name of one of weights; None where its first bytes do not tell."""
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs in place of the file: git lfs pull"
    if head[:1] == b"<":
        return "it is a web page, saved in place of the file"
    return None if head else "it is empty"


def content_of(path: Path, device: str = "cpu") -> Any:
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


def identify(path: Path) -> str:
    """``kind_of`` for a file on the disk, whatever it is; its tensors stay unread."""
    if not path.is_file():
        return "no plain file"
    try:
        content = content_of(path, "meta")
        return kind_of(content) if isinstance(content, Mapping) else f"a {type(content).__name__}"
    except Exception:  # not to know is an answer
        return kind_of_bytes(path) or "no file of weights"

"""The three members of the later family: their recorded numbers, and tiny models with the recorded weights."""

import functools

import torch
from golden_data import DEVICE, GOLDEN, read_json
from PIL import Image
from safetensors.torch import load_file

from minigpt4.models import MiniGPT4
from minigpt4.processors import Blip2ImageEvalProcessor

FAMILY = GOLDEN / "family"
MEMBERS = ("vicuna0", "llama2", "v2")
DIMS = read_json("dims.json", FAMILY)
PATHS = ("q_former_model", "llama_model", "ckpt")


def recorded(member, name):
    """A recorded JSON file."""
    return read_json(f"{name}.json", FAMILY / member)


@functools.cache
def tensors(member, name):
    """The tensors of a recorded file."""
    return load_file(FAMILY / member / f"{name}.safetensors")


def section(member, **changes):
    """The ``model`` section of a member, with changes."""
    given = DIMS["configs"][member]
    cfg = {key: str(FAMILY / value) if key in PATHS else value for key, value in given.items()}
    vit = {name: DIMS["vit"][name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    cfg |= {"vit_weights": str(FAMILY / "eva_vit_g.pth"), "vit_config": vit, "llm_dtype": "fp32", "lora_dropout": 0.0}
    return cfg | {"qformer_config": {name: DIMS["qformer"][name] for name in sizes}} | changes


def load(member, **changes):
    """A new model on the tests' device."""
    return MiniGPT4.from_config(section(member, **changes), device=DEVICE)


@functools.cache
def shared(member):
    """One model of a member: change it through ``monkeypatch`` only."""
    return load(member).eval()


def images(member, numbers, image_size=None):
    """Recorded images [n, 3, S, S] as a member sees them.

    At 56 pixels the recorded tensors: Pillow versions differ for an image that is widened and shortened, as number 2.
    """
    size = image_size or DIMS["image_size"][member]
    process = Blip2ImageEvalProcessor(size)
    if size == 56:
        given = tensors("vicuna0", "vision")["image"]
        pixels = [given[k] if k < len(given) else process(Image.open(picture(k))) for k in numbers]
    else:
        pixels = [process(Image.open(picture(k))) for k in numbers]
    return torch.stack(pixels).to(DEVICE)


def picture(k):
    """The file of a recorded image."""
    return FAMILY / "images" / f"model_{k}.png"

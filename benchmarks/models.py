"""Models for the benchmarks, with random weights: MiniGPT-4 in several sizes, and the same as transformers' BLIP-2.

Shapes: B batch, S image side, T tokens of the longest row.
"""

import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minigpt4.models import language_model as lm
from minigpt4.models.eva_vit import build_eva_vit, round_vit_weights
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.mini_gpt4 import IGNORE_INDEX, IMAGE_TOKEN_INDEX, MiniGPT4
from minigpt4.models.Qformer import QFormer, QFormerConfig
from minigpt4.models.quantization import quantize_layers

ROOT = Path(__file__).parents[1]
TEMPLATE = "###Human: {} ###Assistant: "
PROMPT = TEMPLATE.format("<Img><ImageHere></Img> Describe this image in detail.")
WORDS = ("large", "small", "red", "green", "blue", "circle", "square", "triangle", "left", "right", "top")


@dataclass(frozen=True)
class Preset:
    """Widths and depths of vision transformer, Q-Former and language model."""

    vit: tuple[int, int, int, float]  # width, layers, heads, MLP ratio
    q_former: tuple[int, int, int]  # width, layers, heads
    lm: tuple[int, int, int, int]  # width, layers, heads, MLP width
    vocabulary: int = 32000
    image: int = 224
    queries: int = 32


PRESETS = {
    "tiny": Preset((64, 2, 4, 4.0), (64, 2, 4), (64, 2, 4, 172), image=56),
    "small": Preset((384, 8, 6, 4.0), (384, 6, 6), (512, 8, 8, 1376)),
    "7b": Preset((1408, 39, 16, 4.3637), (768, 12, 12), (4096, 32, 32, 11008), vocabulary=32001),
    "13b": Preset((1408, 39, 16, 4.3637), (768, 12, 12), (5120, 40, 40, 13824), vocabulary=32001),
}


def llama_settings(preset: Preset) -> dict[str, int]:
    """The preset's language model as arguments of ``transformers.LlamaConfig``."""
    width, depth, heads, inner = preset.lm
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return sizes | {"intermediate_size": inner, "vocab_size": preset.vocabulary}


def build_language_model(
    preset: Preset, device: torch.device, dtype: torch.dtype, kind: str | None = None
) -> nn.Module:
    """The preset's frozen LM as a run builds it, its random weights created on the device."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        LlamaConfig(**llama_settings(preset), architectures=["LlamaForCausalLM"]).save_pretrained(path)
        (path / "model.safetensors").touch()  # a folder without weights is refused
        llm = lm.build_language_model(path, dtype)
    tensors = {name: random_weight(value.shape, device, dtype) for name, value in llm.state_dict().items()}
    lm.fill_weights(llm, tensors, dtype, device, path, partial(quantize_layers, kind=kind) if kind else None)
    return llm


def build_plain_language_model(preset: Preset, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The preset's LM as transformers builds it, with eager attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with device:
        llm = LlamaForCausalLM(LlamaConfig(**llama_settings(preset), attn_implementation="eager"))
    return llm.to(dtype).requires_grad_(False).eval()


def random_weight(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ones for a norm, else normally distributed values."""
    value = torch.empty(shape, device=device, dtype=dtype)
    return value.fill_(1) if len(shape) == 1 else value.normal_(std=0.02)


def build_minigpt4(
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    stage: int = 1,
    has_vision: bool = True,
    kind: str | None = None,
) -> MiniGPT4:
    """MiniGPT-4 in the precisions of a run: LM and vision transformer in ``dtype``, the rest float32."""
    vit_width, vit_depth, vit_heads, ratio = preset.vit
    q_width, q_depth, q_heads = preset.q_former
    vit_config = {"embed_dim": vit_width, "depth": vit_depth, "num_heads": vit_heads, "mlp_ratio": ratio}
    sizes = {"hidden_size": q_width, "num_hidden_layers": q_depth, "num_attention_heads": q_heads}
    q_config = QFormerConfig(**sizes, intermediate_size=4 * q_width, encoder_width=vit_width)
    llm = build_language_model(preset, device, dtype, kind)
    with device:
        vit = build_eva_vit(preset.image, vit_config=vit_config) if has_vision else None
        model = MiniGPT4(
            vit,
            QFormer(q_config) if has_vision else None,
            llm,
            load_tokenizer(ROOT / "quickstart" / "weights" / "llama"),
            num_query_token=preset.queries,
            feature_width=q_width,
            prompts=[PROMPT] if stage == 2 else (),
            prompt_template=TEMPLATE if stage == 2 else "",
            max_txt_len=160 if stage == 2 else 32,
            end_sym="###" if stage == 2 else "\n",
            vit_dtype=dtype,
        )
    if vit is not None and dtype != torch.float32:
        round_vit_weights(vit, dtype)
    return model.to(device)


def build_blip2(preset: Preset, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
    """transformers' BLIP-2 of the same sizes, only ``language_projection`` trained.

    Precisions are those that transformers loads BLIP-2 in, except that the trained projection is float32: vision
    transformer and LM in ``dtype``, Q-Former float32.

    Args:
        attention: "sdpa" or "eager".
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig

    vit_width, vit_depth, vit_heads, ratio = preset.vit
    q_width, q_depth, q_heads = preset.q_former
    vision = {"hidden_size": vit_width, "num_hidden_layers": vit_depth, "num_attention_heads": vit_heads}
    sizes = {"hidden_size": q_width, "num_hidden_layers": q_depth, "num_attention_heads": q_heads}
    config = Blip2Config(
        vision_config=vision | {"intermediate_size": int(vit_width * ratio), "image_size": preset.image},
        qformer_config=sizes | {"intermediate_size": 4 * q_width, "encoder_hidden_size": vit_width},
        text_config=LlamaConfig(**llama_settings(preset)),
        num_query_tokens=preset.queries,
        image_token_index=preset.vocabulary - 1,
        attn_implementation=attention,
    )
    with device:
        model = Blip2ForConditionalGeneration(config)
    model.vision_model.to(dtype)
    model.language_model.to(dtype)
    model.requires_grad_(False).eval()
    model.language_projection.requires_grad_(True)
    return model


def blip2_inputs(model: MiniGPT4, samples: Mapping[str, Any], image_token: int) -> dict[str, Tensor]:
    """The tokens that ``model`` trains on, as padded inputs of BLIP-2: int64 [B, T] and the images [B, 3, S, S]."""
    rows = model.tokenize_rows(samples["text_input"], model.choose_prompts(samples))
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    inputs = {
        "input_ids": ids.masked_fill(ids == IMAGE_TOKEN_INDEX, image_token),
        "attention_mask": pad_sequence([torch.ones(len(row.ids), dtype=torch.long) for row in rows], batch_first=True),
        "labels": pad_sequence(
            [torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=float(IGNORE_INDEX)
        ),
    }
    return {"pixel_values": samples["image"]} | {
        name: value.to(samples["image"].device) for name, value in inputs.items()
    }


def captions(mean: int, batch: int, seed: int) -> list[str]:
    """Random texts of one-token words. Lengths are log-normal about a mean, cut at 8/3 of it, as captions are."""
    rng = random.Random(seed)
    lengths = [min(8 * mean // 3 - 1, max(4, round(mean * rng.lognormvariate(-0.06, 0.35)))) for _ in range(batch)]
    return [" ".join(rng.choice(WORDS) for _ in range(length)) for length in lengths]

"""EVA-ViT-g/14 (Fang et al., 2022), the vision transformer of BLIP-2, built from timm.

Parameter names are those of the published file. Shapes: B batch, S image side, N = 1 + (S / patch)^2 tokens, E width.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from minigpt4.common.schema import VitConfig, read_section


def build_eva_vit(
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
    vit_config: VitConfig | Mapping[str, Any] | None = None,
) -> Eva:
    """Builds an EVA-ViT from images [B, 3, S, S] to tokens [B, N, E]: class token first, no pooling, no final norm.

    Args:
        image_size: side S of the square input in pixels, a multiple of the patch size.
        drop_path_rate: stochastic depth (Huang et al., 2016) of the last block; active in training mode only.
        use_grad_checkpoint: recompute activations in the backward pass.
        vit_config: another size than EVA-ViT-g/14.
    """
    vit = Eva(
        img_size=image_size,
        num_classes=0,
        global_pool="",
        use_post_transformer_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        drop_path_rate=drop_path_rate,
        **asdict(read_section(VitConfig, vit_config, "model.vit_config")),
    )
    vit.set_grad_checkpointing(use_grad_checkpoint)
    return vit


def round_vit_weights(vit: nn.Module, dtype: torch.dtype, keep_float32: bool = False) -> None:
    """Rounds the weights and biases of Linear and Conv layers to ``dtype`` in place, as ``vit_precision`` asks.

    Norms, positions, the class token and the separate q and v biases become float32, as in the reference; with
    ``keep_float32`` so do the rounded values, for devices that compute in float32.
    """
    for module in vit.modules():
        is_rounded = isinstance(module, nn.Linear | nn.Conv2d)
        for parameter in module.parameters(recurse=False):
            value = parameter.data.to(dtype) if is_rounded else parameter.data
            parameter.data = value.float() if keep_float32 or not is_rounded else value


def interpolate_pos_embed(pos_embed: Tensor, num_tokens: int) -> Tensor:
    """Resizes learned positions [1, 1 + a*a, E] bicubically to [1, num_tokens, E], and keeps the class token.

    Tensors of any other shape are returned unchanged, so that loading reports the mismatch.
    """
    num_old = pos_embed.shape[1] if pos_embed.ndim == 3 and len(pos_embed) == 1 else 0
    if num_old < 2 or math.isqrt(num_old - 1) ** 2 != num_old - 1:
        return pos_embed
    side = math.isqrt(num_tokens - 1)
    return resample_abs_pos_embed(pos_embed, [side, side], antialias=False)

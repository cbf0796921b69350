"""The vision tower: EVA-ViT-g/14 (Fang et al., 2022), as published with BLIP-2.

timm's ``Eva`` has the parameter names of the published file, so this room only says which ``Eva`` it is.

Shapes: B batch, S image side, P = (S / patch)^2 patches, E embedding width.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.models.eva import Eva
from torch import nn

EVA_VIT_G: dict[str, Any] = {
    "patch_size": 14,
    "embed_dim": 1408,
    "depth": 39,
    "num_heads": 16,
    "mlp_ratio": 4.3637,
}


def build_eva_vit(
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
    vit_config: dict[str, Any] | None = None,
) -> Eva:
    """Builds an EVA vision transformer with random weights; reads no file.

    Args:
        image_size: side S of the square input, in pixels, a multiple of the patch size.
        drop_path_rate: stochastic depth, active only while the tower trains.
        use_grad_checkpoint: recompute activations in backward, where the tower trains.
        vit_config: overrides of ``EVA_VIT_G``.

    Returns:
        A module from images [B, 3, S, S] to tokens [B, 1 + P, E], the class token first and no final norm.
    """
    config = EVA_VIT_G | dict(vit_config or {})
    vit = Eva(
        img_size=image_size,
        num_classes=0,
        global_pool="",
        use_post_transformer_norm=False,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        drop_path_rate=drop_path_rate,
        **config,
    )
    vit.set_grad_checkpointing(use_grad_checkpoint)
    return vit


def round_vit_weights(vit: nn.Module, dtype: torch.dtype, keep_float32: bool = False) -> None:
    """Brings the weights and biases of Linear and Conv layers to ``dtype``, as ``vit_precision`` asks.

    Norms, positions, the class token and the separate q and v biases stay float32, as in the reference.
    With ``keep_float32`` the rounded values are stored as float32, for devices that compute in float32.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    rounded = parameter.data.to(dtype)
                    parameter.data = rounded.float() if keep_float32 else rounded


def interpolate_pos_embed(pos_embed: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Resizes learned positions [1, 1 + a*a, E] bicubically to [1, num_tokens, E], class token untouched.

    Tensors of other shapes come back as they are.
    """
    num_old = pos_embed.shape[1] if pos_embed.ndim == 3 and len(pos_embed) == 1 else 0
    old_side, new_side = math.isqrt(max(num_old - 1, 0)), round((num_tokens - 1) ** 0.5)
    if num_old == num_tokens or old_side == 0 or old_side**2 != num_old - 1:
        return pos_embed
    class_position, grid = pos_embed[:, :1], pos_embed[:, 1:].float()
    grid = grid.reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([class_position, grid], dim=1)

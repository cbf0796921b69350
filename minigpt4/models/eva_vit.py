"""The vision tower: EVA-ViT-g/14 (Fang et al., 2022), as published with BLIP-2, under its parameter names.

A pre-norm transformer with learned positions, biases on queries and values and none on keys. The numbers are those of
timm's ``Eva``, to the bit; importing timm for this one class takes as long as importing torch.

Shapes: B batch, S image side, P = (S / patch)^2 patches, N = 1 + P tokens, E embedding width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

EVA_VIT_G: dict[str, Any] = {
    "patch_size": 14,
    "embed_dim": 1408,
    "depth": 39,
    "num_heads": 16,
    "mlp_ratio": 4.3637,
}


class PatchEmbed(nn.Module):
    """A picture's patches, each as one vector: [B, 3, S, S] -> [B, P, E]."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E]."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {list(image.shape[-2:])}, the vision tower takes {self.image_size} squared")
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, E] -> [B, N, E]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, N, E]."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, E / heads]
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, N, E]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added; ``drop`` of the rows skip each while the tower trains."""

    def __init__(self, width: int, num_heads: int, inner: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, N, E]."""
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, update: Tensor) -> Tensor:
        """Stochastic depth (Huang et al., 2016): whole rows left out, the others scaled up."""
        if not self.training or not self.drop:
            return update
        return update * update.new_empty(len(update), 1, 1).bernoulli_(1 - self.drop).div_(1 - self.drop)


class EvaViT(nn.Module):
    """Images [B, 3, S, S] to tokens [B, N, E], the class token first and no final norm; see ``build_eva_vit``."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
        use_grad_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.use_grad_checkpoint = use_grad_checkpoint
        self.patch_embed = PatchEmbed(image_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        inner = int(embed_dim * mlp_ratio)
        drops = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # deeper blocks are skipped more often
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, inner, drop) for drop in drops)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for number, block in enumerate(self.blocks, 1):  # so that the sum over blocks stays of one size
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.trunc_normal_(layer.weight, std=0.02 / (2 * number) ** 0.5)

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, E]."""
        x = self.patch_embed(image)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            if self.use_grad_checkpoint and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    forward = forward_features


def build_eva_vit(
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
    vit_config: dict[str, Any] | None = None,
) -> EvaViT:
    """Builds an EVA vision transformer with random weights; reads no file.

    Args:
        image_size: side S of the square input, in pixels, a multiple of the patch size.
        drop_path_rate: stochastic depth of the last block, active only while the tower trains.
        use_grad_checkpoint: recompute activations in backward, where the tower trains.
        vit_config: overrides of ``EVA_VIT_G``.

    Returns:
        A module from images [B, 3, S, S] to tokens [B, 1 + P, E], the class token first and no final norm.
    """
    config = EVA_VIT_G | dict(vit_config or {})
    return EvaViT(image_size, **config, drop_path_rate=drop_path_rate, use_grad_checkpoint=use_grad_checkpoint)


def round_vit_weights(vit: nn.Module, dtype: torch.dtype, keep_float32: bool = False) -> None:
    """Brings the weights and biases of Linear and Conv layers to ``dtype``, as ``vit_precision`` asks, from any other.

    Norms, positions, the class token and the separate q and v biases become float32, as in the reference.
    With ``keep_float32`` the rounded values are stored as float32, for devices that compute in float32. What a file
    holds in ``dtype`` already stays where it is.
    """
    for module in vit.modules():
        is_rounded = isinstance(module, nn.Linear | nn.Conv2d)
        for parameter in module.parameters(recurse=False):
            value = parameter.data.to(dtype) if is_rounded else parameter.data
            parameter.data = value.float() if keep_float32 or not is_rounded else value


def interpolate_pos_embed(pos_embed: Tensor, num_tokens: int) -> Tensor:
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

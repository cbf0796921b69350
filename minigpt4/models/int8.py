"""8-bit weights for the frozen LM: a byte a weight and a scale a row, computed with in the input's precision."""

from typing import Any

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A frozen linear layer, weight int8 [out, in] with float32 scales [out, 1]; gradients reach its input only.

    Symmetric rounding by the largest value of each row. One layer at a time is spread out to the input's precision,
    which costs time and saves the memory of all others.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.quantize(linear.weight.detach())

    def quantize(self, weight: Tensor) -> None:
        """Rounds a weight [out, in] and holds it in place of the present one."""
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = _Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T without keeping the spread-out W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return (x @ weight.to(x.dtype).T) * scale.squeeze(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale.squeeze(1).to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


def to_int8(model: nn.Module, keep: tuple[str, ...] = ("lm_head",)) -> None:
    """Replaces a model's linear layers in place, except those named in ``keep``; also on the meta device."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in keep:
                setattr(module, name, Int8Linear(child))

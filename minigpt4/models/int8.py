"""8-bit weights for the frozen LM: one byte per weight and one scale per output row, computed in the input's dtype."""

from typing import Any

import torch
from torch import Tensor, nn

MAX_KERNEL_ROWS = 12  # above this, dequantising once and multiplying costs less (measured at width 2048)


class Int8Linear(nn.Linear):
    """A frozen linear layer with int8 weight [out, in] and scale [out, 1] (float32), the largest value of each row.

    Decoding on a CPU in bfloat16 runs PyTorch's kernel; otherwise the layer is dequantised to the input's dtype.
    It is an ``nn.Linear`` for peft, which then adds LoRA weights to it as to a plain one.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.quantize(linear.weight.detach())

    def quantize(self, weight: Tensor) -> None:
        """Quantises a floating-point weight [out, in] and stores it in place of the current one."""
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        y = _Int8Matmul.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Matmul(torch.autograd.Function):
    """x W^T; W is dequantised again in the backward pass instead of being saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        scale, rows = scale.squeeze(1).to(x.dtype), x.reshape(-1, x.shape[-1])
        # No public function runs this kernel: torchao's layers dequantise too unless compiled. It reads out of bounds
        # where the width is no multiple of 16, and its float32 version is slower than dequantising.
        fits = len(rows) <= MAX_KERNEL_ROWS and weight.shape[1] % 32 == 0
        if fits and x.is_cpu and x.dtype == torch.bfloat16:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight, scale)
            return y.view(*x.shape[:-1], -1)
        return (x @ weight.to(x.dtype).T) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale.squeeze(1).to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


def to_int8(llm: nn.Module) -> None:
    """Replaces an LM's linear layers in place, except its output layer; also on the meta device."""
    kept = llm.get_output_embeddings()
    for module in list(llm.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not kept:
                setattr(module, name, Int8Linear(child))

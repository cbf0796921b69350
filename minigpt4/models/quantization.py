"""Quantised weights for the linear layers of the frozen LM, of 8 or 4 bits, computed in the dtype of the input."""

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MAX_KERNEL_ROWS = 12  # above this, dequantising once and multiplying costs less (measured at width 2048)
BLOCK_SIZE = 64  # weights that share a scale in NF4 (Dettmers et al., 2023)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import, also by peft, recommends another package


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a quantised ``weight`` and its ``scale`` as buffers; also on the meta device.

    It is an ``nn.Linear`` for peft, which then adds LoRA weights to it as to a plain one.
    """

    name: ClassVar[str]  # for users

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.quantize(linear.weight.detach())

    def quantize(self, weight: Tensor) -> None:
        """Quantises a floating-point weight [out, in] and stores it in place of the current one."""
        raise NotImplementedError

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T: [..., in] -> [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Linear(QuantizedLinear):
    """One byte per weight, int8 [out, in], and scale [out, 1] (float32), the largest value of each row.

    Decoding on a CPU in bfloat16 runs PyTorch's kernel; otherwise the layer is dequantised to the input's dtype.
    """

    name = "8 bit"

    def quantize(self, weight: Tensor) -> None:
        """Rounds to the nearest of 255 values."""
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Int8Matmul.apply(x, self.weight, self.scale)
        return int8_matmul(x, self.weight, self.scale)


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of 8-bit weights: [..., in] to [..., out]."""
    # No public function runs this kernel: torchao's layers dequantise too unless compiled. It reads out of bounds
    # where the width is no multiple of 16, and its float32 version is slower than dequantising.
    if x.is_cpu and x.dtype == torch.bfloat16 and weight.shape[1] % 32 == 0:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= MAX_KERNEL_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight, scale.squeeze(1).to(x.dtype))
            return y.view(*x.shape[:-1], -1)
    return linear(x, weight.to(x.dtype)) * scale.squeeze(1).to(x.dtype)


class _Int8Matmul(torch.autograd.Function):
    """The same, with the gradient of ``x``; W is dequantised again in the backward pass instead of being saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return int8_matmul(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale.squeeze(1).to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


class NF4Linear(QuantizedLinear):
    """Half a byte per weight, NF4 of bitsandbytes: uint8 [out * in / 2, 1], and float32 scales of 64 weights each.

    The library's kernels compute it, and dequantise the weight in the backward pass.
    """

    name = "NF4"

    def quantize(self, weight: Tensor) -> None:
        """Rounds to the nearest of NF4's 16 values."""
        from bitsandbytes.functional import quantize_4bit  # takes a second to import

        packed, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
        self.register_buffer("weight", packed)
        self.register_buffer("scale", state.absmax)

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T."""
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.scale, shape, blocksize=BLOCK_SIZE, quant_type="nf4", dtype=x.dtype)
        return matmul_4bit(x, self.weight.t(), state)


LAYERS = {"int8": Int8Linear, "nf4": NF4Linear}  # by model.llm_precision


def quantize_layers(llm: nn.Module, kind: str) -> None:
    """Replaces an LM's linear layers in place by those of a kind of ``LAYERS``, except its output layer."""
    kept = llm.get_output_embeddings()
    for module in list(llm.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not kept:
                setattr(module, name, LAYERS[kind](child))


def precision_name(llm: nn.Module) -> str:
    """What the weights of an LM's layers are stored in, for users."""
    quantized = (module.name for module in llm.modules() if isinstance(module, QuantizedLinear))
    return next(quantized, str(next(llm.parameters()).dtype).removeprefix("torch."))

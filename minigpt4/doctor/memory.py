"""How much memory a device needs: the model's own steps, run without data, with every tensor they hold counted.

A step here computes shapes only, so a model of 7 billion weights takes seconds and no memory: on PyTorch's fake
tensors, which take the very ways that the device would, or for a CPU on the meta device, which is fast.
What is counted are the bytes of tensors. Not counted is what a device keeps besides: its context and the work space of
its libraries, some hundred MB on a card, and what an allocator reserves and does not use.
"""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt4.common import device as devices
from minigpt4.models.language_model import new_cache, next_token_logits

PARTS = {
    "vision": ("visual_encoder", "ln_vision", "Qformer", "query_tokens"),
    "language model": ("llama_model",),
    "projection": ("llama_proj",),
}


class Ledger(TorchDispatchMode):
    """While entered, what touches a tensor of the device computes shapes only, and living bytes are counted there.

    Tensors of the host stay real, as a step reads numbers from them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = torch.device("meta") if device.type == "cpu" else device
        self.fake = nullcontext() if device.type == "cpu" else FakeTensorMode(allow_non_fake_inputs=True)
        self.attention = _CPUAttention() if device.type == "cpu" else nullcontext()
        self.now = 0
        self.peak = 0
        self._living: dict[int, weakref.ref] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the device."""
        with self.fake:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self._count(tensor)
        return tensor

    def take(self, module: nn.Module) -> None:
        """Puts tensors of the device in place of a module's own, which may be on the meta device."""
        taken: dict[int, Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, value in tensors.items():
                    if value is None:
                        continue
                    if id(value) not in taken:
                        fake = self.empty(value.shape, value.dtype)
                        is_parameter = isinstance(value, nn.Parameter)
                        taken[id(value)] = nn.Parameter(fake, value.requires_grad) if is_parameter else fake
                    tensors[name] = taken[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(map(self._is_of_device, tree_leaves((args, kwargs)))):
            with self.fake:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.device.type:
                self._count(value)
                if func is torch.ops.aten._safe_softmax.default:  # which marks rows without any weight inside itself
                    self.peak = max(self.peak, self.now + value.numel())
        return result

    def _is_of_device(self, value: Any) -> bool:
        if isinstance(value, torch.device):
            return value.type == self.device.type
        return isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._living:
            self._living[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._living[key]
        self.now -= size


class _CPUAttention(TorchFunctionMode):
    """The kernel that a CPU takes for attention, where the meta device would form the matrix of all weights."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not args[0].is_meta or kwargs.get("dropout_p"):
            return func(*args, **kwargs)
        query, *pair = args[:3]
        if kwargs.get("enable_gqa"):
            pair = [part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in pair]
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        mask = mask if mask is None else mask.to(query.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        is_causal = bool(kwargs.get("is_causal"))
        return kernel(query, *pair, 0.0, is_causal, attn_mask=mask, scale=kwargs.get("scale"))[0]


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights by part."""
    sizes = {}
    for name, attributes in PARTS.items():
        tensors = {}
        for part in (getattr(model, attribute) for attribute in attributes if hasattr(model, attribute)):
            own = [part] if isinstance(part, Tensor) else [*part.parameters(), *part.buffers()]
            tensors |= {id(tensor): tensor.numel() * tensor.element_size() for tensor in own}
        sizes[name] = sum(tensors.values())
    return sizes


def amp_dtype(run_cfg: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The precision in which a run computes its steps."""
    half, wanted = devices.default_dtype(device), run_cfg.get("amp_dtype")
    if not run_cfg.get("amp", False) or half == torch.float32:
        return torch.float32
    return devices.DTYPES[wanted] if wanted else half


def training(
    model: nn.Module, device: torch.device, amp: torch.dtype, image_size: int, samples: Mapping[str, Any]
) -> dict[str, int]:
    """Bytes by part at the height of a training step.

    Args:
        model: fresh, on the meta device in the precisions of the run; afterwards good for nothing else.
        device: of the run.
        amp: precision of autocast.
        image_size: S.
        samples: ``text_input`` and perhaps ``instruction`` of a batch.
    """
    ledger = Ledger(device)
    ledger.take(model)
    parts = weight_bytes(model)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ledger.peak = before = ledger.now
    num_rows, shape = len(samples["text_input"]), (model.num_query_token, model.llama_proj.in_features)
    if hasattr(model, "visual_encoder"):
        seen = {"image": ledger.empty((num_rows, 3, image_size, image_size))}
    else:
        seen = {"features": ledger.empty((num_rows, *shape), torch.bfloat16)}
    with ledger, ledger.attention:
        with devices.autocast(device, amp):
            loss = model({**seen, **samples})["loss"]
        loss.backward()
    parts["gradients"] = trained
    parts["optimizer"] = 2 * trained  # AdamW's two means
    parts["activations"] = ledger.peak - before - trained
    return parts


def chat(model: nn.Module, device: torch.device, image_size: int, num_tokens: int) -> dict[str, int]:
    """Bytes by part at the height of an answer whose context has ``num_tokens``; arguments as for ``training``."""
    ledger = Ledger(device)
    ledger.take(model.eval())
    parts = weight_bytes(model)
    image = ledger.empty((1, 3, image_size, image_size))
    ledger.peak = before = ledger.now
    cache = new_cache()
    with torch.no_grad(), ledger, ledger.attention:
        images, _ = model.encode_img(image)
        embedding = model.llama_model.get_input_embeddings().weight
        for length in (num_tokens - 1, 1):  # the question is read, the last token of the answer follows
            embeds = ledger.empty((1, length, embedding.shape[1]), embedding.dtype)
            mask = torch.ones(1, cache.get_seq_length() + length, dtype=torch.long)
            logits = next_token_logits(model.llama_model, embeds, mask, cache)
    del images, logits
    parts["keys and values"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    parts["activations"] = max(0, ledger.peak - before - parts["keys and values"])
    return parts

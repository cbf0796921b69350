"""How much memory a device needs: a step of the model itself on fake tensors, with every tensor of the device counted.

A fake step computes shapes only, so a model of 7 billion weights takes seconds and no memory. Not counted is what a
device keeps besides tensors: its context and the work space of its libraries, some hundred MB on a card, and what the
allocator reserves and does not use.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Fake tensors and dispatch modes have no public name. PyTorch's own tracker (torch.distributed._tools.mem_tracker) is
# private as well, and fails for frozen parameters.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt4.common import device as devices
from minigpt4.models.language_model import new_cache, next_token_logits

PARTS = {
    "vision": ("visual_encoder", "ln_vision", "Qformer", "query_tokens"),
    "language model": ("llama_model",),
    "projection": ("llama_proj",),
}


class MemoryTracker(TorchDispatchMode):
    """While entered, counts the bytes of the living tensors of a device: ``current`` and the highest, ``peak``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device_type = device.type
        self.current = self.peak = 0
        self._living: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.device_type:
                self.add(value)
                if func is torch.ops.aten._safe_softmax.default:  # it marks fully masked rows inside itself
                    self.peak = max(self.peak, self.current + value.numel())
        return result

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._living:
            self._living[key] = weakref.ref(storage, lambda _: self._remove(key, size))
            self.current += size
            self.peak = max(self.peak, self.current)

    def _remove(self, key: int, size: int) -> None:
        del self._living[key]
        self.current -= size


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


def training(
    model: nn.Module, device: torch.device, amp: torch.dtype, image_size: int, samples: Mapping[str, Any]
) -> dict[str, int]:
    """Bytes by part at the peak of a training step.

    Args:
        model: without weights, in the precisions of the run; afterwards its parameters are fake.
        device: of the run.
        amp: precision of autocast.
        image_size: S.
        samples: ``text_input`` and perhaps ``instruction`` of a batch.
    """
    parts, rows = weight_bytes(model), len(samples["text_input"])
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    tracker = MemoryTracker(device)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model.to_empty(device=device)
        if hasattr(model, "visual_encoder"):
            inputs = {"image": torch.empty(rows, 3, image_size, image_size, device=device)}
        else:
            shape = rows, model.num_query_token, model.llama_proj.in_features
            inputs = {"features": torch.empty(shape, dtype=torch.bfloat16, device=device)}
        tracker.peak = before = tracker.current
        with devices.autocast(device, amp):
            loss = model({**inputs, **samples})["loss"]
        loss.backward()
    parts["gradients"] = trained
    parts["optimizer"] = 2 * trained  # AdamW's two moments
    parts["activations"] = tracker.peak - before - trained + sum(value.nbytes for value in inputs.values())
    return parts


def chat(model: nn.Module, device: torch.device, image_size: int, num_tokens: int) -> dict[str, int]:
    """Bytes by part at the peak of an answer whose context has ``num_tokens``; arguments as for ``training``."""
    parts, tracker, cache = weight_bytes(model.eval()), MemoryTracker(device), new_cache()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model.to_empty(device=device)
        tracker.peak = before = tracker.current
        images, _ = model.encode_img(torch.empty(1, 3, image_size, image_size, device=device))
        embedding = model.llama_model.get_input_embeddings().weight
        for length in (num_tokens - 1, 1):  # the question is prefilled, the last token of the answer follows
            embeds = torch.empty(1, length, embedding.shape[1], dtype=embedding.dtype, device=device)
            mask = torch.ones(1, cache.get_seq_length() + length, dtype=torch.long)
            logits = next_token_logits(model.llama_model, embeds, mask, cache)
        del images, logits, embeds
        parts["keys and values"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    parts["activations"] = max(0, tracker.peak - before - parts["keys and values"])
    return parts

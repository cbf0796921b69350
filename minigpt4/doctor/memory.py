"""How much memory a device needs: a step of the model itself on fake tensors, with every tensor of the device counted.

A fake step computes shapes only, so a model of 7 billion weights takes seconds and no memory. Not counted are the
device's context, the work space of its libraries, and what the allocator reserves and does not use.
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
from minigpt4.conversation.answer_batch import PREFILL_TOKENS
from minigpt4.models.growing_cache import new_cache
from minigpt4.models.language_model import next_token_logits
from minigpt4.models.lora import is_lora
from minigpt4.models.text_rows import captions_of

PARTS = {"llama_model": "language model", "llama_proj": "projection"}  # by attribute; the others are vision


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
                self._add(value.untyped_storage())
                if func is torch.ops.aten._safe_softmax.default:  # it marks fully masked rows inside itself
                    self.peak = max(self.peak, self.current + value.numel())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
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
    sizes = {"vision": 0, "language model": 0, "projection": 0}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        part = "LoRA" if is_lora(name) else PARTS.get(name.split(".")[0], "vision")
        sizes[part] = sizes.get(part, 0) + value.numel() * value.element_size()
    return sizes


def _computing(device: torch.device) -> torch.device:
    """Where fake tensors are computed; a card that is not present computes the same shapes as the CPU."""
    return torch.device("cpu") if device.type == "meta" else device


def training(
    model: nn.Module, device: torch.device, amp: torch.dtype, image_size: int, samples: Mapping[str, Any]
) -> dict[str, int]:
    """Bytes by part at the peak of a training step.

    Args:
        model: without weights, in the precisions of the run; afterwards its parameters are fake.
        device, amp: of the run; ``amp`` is the precision of autocast.
        image_size: S.
        samples: texts of a batch, as the model's ``forward`` takes them, and perhaps ``num_images``.
    """
    device, parts = _computing(device), weight_bytes(model)
    num_images = sum(samples.get("num_images") or [1] * len(captions_of(samples)))
    if getattr(model, "prompt_list", None):  # of which a step draws one
        model.prompt_list = [max(model.prompt_list, key=len)]
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    tracker = MemoryTracker(device)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model.to_empty(device=device)
        if hasattr(model, "visual_encoder"):
            inputs = {"image": torch.empty(num_images, 3, image_size, image_size, device=device)}
        else:
            shape = num_images, model.num_query_token, model.llama_proj.in_features
            inputs = {"features": torch.empty(shape, dtype=torch.bfloat16, device=device)}
        tracker.peak = before = tracker.current
        with devices.autocast(device, amp):
            loss = model({**inputs, **samples})["loss"]
        loss.backward()
    activations = tracker.peak - before - trained + sum(value.nbytes for value in inputs.values())
    return parts | {"gradients": trained, "optimizer": 2 * trained, "activations": activations}  # AdamW's two moments


def chat(model: nn.Module, device: torch.device, image_size: int, num_tokens: int) -> dict[str, int]:
    """Bytes by part at the peak of an answer whose context has ``num_tokens``; arguments as for ``training``."""
    device, parts, cache = _computing(device), weight_bytes(model.eval()), new_cache()
    tracker = MemoryTracker(device)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model.to_empty(device=device)
        tracker.peak = before = tracker.current
        images, _ = model.encode_img(torch.empty(1, 3, image_size, image_size, device=device))
        embedding = model.llama_model.get_input_embeddings().weight
        whole, rest = divmod(num_tokens - 2, PREFILL_TOKENS)
        # The question is prefilled in parts of which the last is not empty, and the last token of the answer follows.
        for length in (*[PREFILL_TOKENS] * whole, rest + 1, 1):
            embeds = torch.empty(1, length, embedding.shape[1], dtype=embedding.dtype, device=device)
            mask = torch.ones(1, cache.get_seq_length() + length, dtype=torch.long)
            logits = next_token_logits(model.llama_model, embeds, mask, cache)
        del images, logits, embeds
        parts_of_cache = [part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values)]
        stored = sum(storage.nbytes() for storage in parts_of_cache)  # with room for further tokens
    return parts | {"keys and values": stored, "activations": max(0, tracker.peak - before - stored)}


def vision(encoder: nn.Module, device: torch.device, image_size: int, rows: int) -> dict[str, int]:
    """Bytes by part at the peak of encoding that many images with a frozen ``VisionEncoder`` on the meta device."""
    device, parts = _computing(device), {"vision": weight_bytes(encoder)["vision"]}
    tracker = MemoryTracker(device)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), tracker:
        encoder.to_empty(device=device)
        tracker.peak = before = tracker.current
        encoder.encode_images(torch.empty(rows, 3, image_size, image_size, device=device))
    return parts | {"activations": tracker.peak - before}

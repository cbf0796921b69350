"""Decoding steps whose kernels are recorded once and replayed.

A step of a 7B model launches a thousand kernels, which takes the host of a fast GPU three times as long as the GPU
computes. A recording needs tensors that keep shape and address: the whole buffers of the cache, of which a mask shows
what is in use. It is made where a batch has stayed the same for some steps, and made again where rows join or leave or
the buffers grow.

Shapes: B rows, S cached positions, C positions of the cache's buffers, V vocabulary.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from minigpt4.models.language_model import forward_cached, next_token_logits

NUM_PLAIN_STEPS = 6  # of an unchanged batch before it is recorded, which takes as long as some three steps
Record = Callable[[Callable[[], None]], Callable[[], None]]  # as of devices.recorder: a function to its replay


class RecordedStep:
    """Feeds one token to each row, like ``next_token_logits``, whose results it has up to rounding.

    Args:
        llm: the language model; hooks of its modules are called while a step is recorded only.
        record: None computes every step anew.
    """

    def __init__(self, llm: PreTrainedModel, record: Record | None = None) -> None:
        self.llm, self._record = llm, record if record and _can_be_recorded(llm) else None
        self._batch: tuple[int, ...] = ()  # what the recording is for: addresses and sizes
        self._num_steps = 0  # of this batch
        self._replay: Callable[[], None] | None = None

    def logits(self, ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits float32 [B, V] after the tokens ``ids`` [B, 1], which the cache receives.

        ``attention_mask`` is int64 [B, S + 1] on the CPU, 0 on padding. The result is valid until the next call.
        """
        if self._record is None or not self._is_unchanged(len(ids), cache):
            return next_token_logits(self.llm, self.llm.get_input_embeddings()(ids), attention_mask, cache)
        first, (num_rows, length) = cache.layers[0], attention_mask.shape
        if self._replay is None:
            capacity = first.capacity
            self._ids, self._positions = torch.empty_like(ids), torch.empty_like(ids)
            self._end = torch.empty(1, dtype=torch.long, device=ids.device)
            self._mask = torch.zeros(num_rows, 1, 1, capacity, dtype=torch.bool, device=ids.device)
        self._ids.copy_(ids)
        self._positions.copy_(attention_mask.sum(1, keepdim=True) - 1)
        self._end.fill_(first.end)
        self._mask.zero_()
        self._mask[:, 0, 0, first.end + 1 - length : first.end + 1] = attention_mask.to(ids.device) > 0
        for layer in cache.layers:
            layer.next_position = self._end
        try:
            self._compute(cache) if self._replay is None else self._replay()
            logits = self._logits
            if self._replay is None:  # recording computes nothing
                self._replay = self._start_recording(cache)
        finally:
            for layer in cache.layers:
                layer.next_position = None
        for layer in cache.layers:
            layer.advance()
        return logits

    def _is_unchanged(self, num_rows: int, cache: DynamicCache) -> bool:
        """Whether the batch has been the same for some steps; the cache then has room for a token."""
        for layer in cache.layers:
            layer.reserve(1)
        batch = (num_rows, cache.layers[0].capacity, *(layer.address for layer in cache.layers))
        if batch != self._batch:
            self._batch, self._num_steps, self._replay = batch, 0, None
        self._num_steps += 1
        return self._num_steps > NUM_PLAIN_STEPS

    def _compute(self, cache: DynamicCache) -> None:
        embeds = self.llm.get_input_embeddings()(self._ids)
        self._logits = forward_cached(self.llm, embeds, self._mask, self._positions, cache)

    def _start_recording(self, cache: DynamicCache) -> Callable[[], None] | None:
        try:
            return self._record(lambda: self._compute(cache))
        except RuntimeError as error:  # such as out of memory, or a kernel that cannot be recorded
            reason = str(error).split("\n")[0][:200]
            logging.warning("Decoding steps cannot be recorded, so that each is launched anew (%s).", reason)
            self._record = None
            return None


def _can_be_recorded(llm: PreTrainedModel) -> bool:
    """Whether all layers see the whole cache, and none of the weights are fetched from other processes."""
    config = llm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = kinds != {"full_attention"} or bool(getattr(config, "sliding_window", None))
    return not has_window and not any(hasattr(parameter, "placements") for parameter in llm.parameters())

"""Keys and values of a chat with room for further tokens: each is written in place, where DynamicLayer copies all.

Shapes: B rows, G key and value heads, S tokens in the cache, t new tokens, D width of a head.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 64  # tokens; at least an eighth of the cache


class GrowingLayer(DynamicLayer):
    """A layer whose ``keys`` and ``values`` [B, G, S, D] are the first S positions of buffers with room for more.

    Tensors that replace them, as cropping and the selection of rows do, are copied to new buffers by the next update.
    Prefilled tokens are stored without room until the first update that follows.
    """

    _buffers: tuple[Tensor, ...] = ()
    _views: tuple[Tensor | None, ...] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, G, t, D] and returns all keys and values."""
        start = self.get_seq_length()
        if start == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        end = start + key_states.shape[-2]
        is_intact = self.keys is self._views[0] and self.values is self._views[1]
        if not is_intact or end > self._buffers[0].shape[-2]:
            room = max(MIN_ROOM, end // 8)
            self._buffers = tuple(pad(part, (0, 0, 0, end - start + room)) for part in (self.keys, self.values))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = self._views = tuple(buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

"""Keys and values of decoded rows with room for further tokens and rows, which are written in place.

DynamicLayer copies all keys and values for each token. Shapes: B rows, G key and value heads, S positions in the cache,
t new ones, D width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 64  # positions; at least an eighth of the cache


class GrowingLayer(DynamicLayer):
    """A layer whose ``keys`` and ``values`` [B, G, S, D] are parts of larger buffers.

    All rows end together; shorter ones are padded on the left. Tensors that replace ``keys`` and ``values``, as
    cropping and the selection of rows do, are copied to new buffers by the next update. Prefilled tokens are stored
    without room until the first update that follows.
    """

    _buffers: tuple[Tensor, ...] = ()
    _views: tuple[Tensor | None, ...] = (None, None)
    _start = 0  # position of the buffers at which the cache begins
    next_position: Tensor | None = None  # int64 [1]: while given, updates write there and return the whole buffers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, G, t, D] to all rows and returns all keys and values."""
        if self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.next_position is not None:
            whole = tuple(buffer[: len(key_states)] for buffer in self._buffers)
            for buffer, new in zip(whole, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.next_position, new)
            return whole
        (num_rows, _, length, _), num_new = self.keys.shape, key_states.shape[-2]
        self._reserve(num_rows, 0, num_new)
        end = self._start + length + num_new
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:num_rows, :, end - num_new : end] = new
        self._show(num_rows, self._start, end)
        return self.keys, self.values

    def reserve(self, num_new: int) -> None:
        """Makes sure that so many further positions fit into the buffers."""
        self._reserve(len(self.keys), 0, num_new)

    def advance(self) -> None:
        """Adds the token that an update has written at ``next_position``, which must be ``end``."""
        self._show(len(self.keys), self._start, self.end + 1)

    @property
    def end(self) -> int:
        """Position of the buffers at which the next token will be."""
        return self._start + self.keys.shape[-2]

    @property
    def capacity(self) -> int:
        """Positions of the buffers."""
        return self._buffers[0].shape[-2]

    @property
    def address(self) -> int:
        """Where the buffers are in memory."""
        return self._buffers[0].data_ptr()

    def add_rows(self, other: "GrowingLayer") -> None:
        """Adds the rows of another layer [b, G, s, D], which end where the others end."""
        (num_rows, _, length, _), (num_new, _, other_length, _) = self.keys.shape, other.keys.shape
        self._reserve(num_rows + num_new, max(0, other_length - length), 0)
        end = self._start + length
        for buffer, new in zip(self._buffers, (other.keys, other.values), strict=True):
            buffer[num_rows : num_rows + num_new, :, end - other_length : end] = new
        self._show(num_rows + num_new, end - max(length, other_length), end)

    def remove_row(self, index: int) -> None:
        """Removes a row; the last one takes its place."""
        is_intact, num_rows = self._is_intact, len(self.keys) - 1
        for part in (self.keys, self.values):
            part[index] = part[num_rows]
        self.keys, self.values = self.keys[:num_rows], self.values[:num_rows]
        self._views = (self.keys, self.values) if is_intact else self._views

    def drop_first(self, count: int) -> None:
        """Removes the first positions of all rows."""
        is_intact = self._is_intact
        self.keys, self.values = self.keys[..., count:, :], self.values[..., count:, :]
        if is_intact:
            self._views, self._start = (self.keys, self.values), self._start + count

    @property
    def _is_intact(self) -> bool:
        return self.keys is self._views[0] and self.values is self._views[1]

    def _show(self, num_rows: int, start: int, end: int) -> None:
        self.keys, self.values = self._views = tuple(buffer[:num_rows, :, start:end] for buffer in self._buffers)
        self._start = start

    def _reserve(self, num_rows: int, num_before: int, num_after: int) -> None:
        """Makes sure that the buffers have room for so many rows, and positions before and after those in use."""
        rows, heads, length, width = self.keys.shape
        if self._is_intact:
            capacity, _, positions, _ = self._buffers[0].shape
            is_long_enough = num_before <= self._start and self._start + length + num_after <= positions
            if num_rows <= capacity and is_long_enough:
                return
        capacity = num_rows if num_rows == rows else num_rows + num_rows // 4
        positions = num_before + length + num_after
        shape = (capacity, heads, positions + max(MIN_ROOM, positions // 8), width)
        parts, self._buffers, self._start = (self.keys, self.values), (), num_before
        self.keys = self.values = None
        for part in parts:  # zeros: what a mask hides must still be finite
            buffer = part.new_zeros(shape)
            buffer[:rows, :, num_before : num_before + length] = part
            self._buffers += (buffer,)
        self._show(rows, num_before, num_before + length)


def new_cache() -> DynamicCache:
    """An empty cache of keys and values; sliding windows are in the mask, so that every cache can be cropped."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def copy_cache(cache: DynamicCache, rows: slice = slice(None), positions: slice = slice(None)) -> DynamicCache:
    """Rows and positions of a cache in tensors of their own."""
    copied = new_cache()
    for i, layer in enumerate(cache.layers):
        copied.update(layer.keys[rows, :, positions], layer.values[rows, :, positions], i)
    return copied


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of several caches in one; an empty cache becomes a row of padding."""
    joined, length = new_cache(), max(cache.get_seq_length() for cache in caches)
    if length == 0:
        return joined
    template = next(cache for cache in caches if cache.get_seq_length())
    empty = copy_cache(template, slice(1), slice(0))
    filled = [cache if cache.get_seq_length() else empty for cache in caches]
    for i, layers in enumerate(zip(*(cache.layers for cache in filled), strict=True)):
        parts = [layer.keys for layer in layers], [layer.values for layer in layers]
        joined.update(*(torch.cat([pad(x, (0, 0, length - x.shape[-2], 0)) for x in part]) for part in parts), i)
    return joined

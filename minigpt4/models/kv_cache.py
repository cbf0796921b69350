"""Keys and values of what a Llama has read, so that it reads on from there.

Shapes: B rows, S tokens read, t new ones, n of them asked for, H heads, G heads of keys and values, D width of a head,
L width of the LM.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt4.models.llama import Attend, Llama

ROOM = 128  # tokens that a layer's tensors have room for beyond what is needed, whenever they have to grow


class KVCache:
    """The cache of a batch whose shorter rows are padded on the left; it is also how such rows attend.

    New tokens are written in place where there is room. A ``head`` shares tensors and no room, so that it and what it
    was taken from read on without touching each other.
    """

    def __init__(self) -> None:
        self.length = 0  # S
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values [B, G, S or more, D]
        self._mask: Tensor | None = None  # bool [B or 1, 1, t, S + t]; none where causal attention says it all

    def expect(self, mask: Tensor, device: torch.device) -> Tensor:
        """Prepares for a batch's new tokens, of which ``mask`` [B, S + t] is 0 on padding; their positions [B, t]."""
        total, new = mask.shape[1], mask.shape[1] - self.length
        self._mask, is_padded = None, not bool(mask.all())
        if is_padded or (self.length and new > 1):
            self._mask = torch.ones(1, 1, new, total, dtype=torch.bool).tril(self.length)
        if is_padded:  # padding looks at itself, as a softmax over nothing is NaN
            self._mask = self._mask & (mask.bool()[:, None, None] | self._mask.triu(self.length))
        self._mask = self._mask if self._mask is None else self._mask.to(device, non_blocking=True)
        return (mask.cumsum(1) - 1).clamp(min=0)[:, self.length :].to(device, non_blocking=True)

    def of_layer(self, number: int) -> Attend:
        """See ``llama.Attention``."""
        return partial(self._attend, number)

    def _attend(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the last n of the new tokens [B, n, H, D] see of all, with those of [B, t, G, D]: [B, n, H, D]."""
        keys, values = self._write(number, key.transpose(1, 2), value.transpose(1, 2))
        num_queries = query.shape[1]
        mask = None if self._mask is None else self._mask[:, :, -num_queries:]
        mixed = scaled_dot_product_attention(
            *(query.transpose(1, 2), keys, values),
            attn_mask=mask,
            is_causal=mask is None and num_queries > 1,
            enable_gqa=query.shape[2] != keys.shape[1],
        )
        return mixed.transpose(1, 2)

    def _write(self, number: int, *new: Tensor) -> list[Tensor]:
        total = self.length + new[0].shape[2]
        if number == len(self.layers):
            self.layers.append(new)
            return list(new)
        held = self.layers[number]
        if held[0].shape[2] < total:
            held = tuple(part.new_empty(*part.shape[:2], total + ROOM, part.shape[3]) for part in held)
            for roomy, part in zip(held, self.layers[number], strict=True):
                roomy[:, :, : self.length] = part[:, :, : self.length]
            self.layers[number] = held
        for part, piece in zip(held, new, strict=True):
            part[:, :, self.length : total] = piece
        return [part[:, :, :total] for part in held]

    def head(self, length: int) -> "KVCache":
        """The first tokens, nothing copied."""
        return self._changed(length, lambda part: part[:, :, :length])

    def reorder(self, rows: list[int]) -> None:
        """Keeps the given rows, in that order."""
        index = torch.tensor(rows, device=self.layers[0][0].device)
        self.layers = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in self.layers]

    def repeated(self, count: int) -> "KVCache":
        """Copies of each row, one after the other."""
        return self._changed(self.length, lambda part: part[:, :, : self.length].repeat_interleave(count, 0))

    def _changed(self, length: int, change: Callable[[Tensor], Tensor]) -> "KVCache":
        other = KVCache()
        other.length, other.layers = length, [(change(keys), change(values)) for keys, values in self.layers]
        return other


def read(llama: Llama, embeds: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """Reads on: embeddings [B, t, L] behind what ``cache`` holds, which takes them in; last hidden states [B, L].

    Args:
        llama: the LM.
        embeds: of the new tokens, the shorter rows padded on the left.
        mask: int64 [B, S + t] on the CPU, 0 on padding.
        cache: of what was read before.
    """
    positions, num_new = cache.expect(mask, embeds.device), embeds.shape[1]
    last = torch.tensor([num_new - 1], device=embeds.device) if num_new > 1 else None
    hidden = llama.model(embeds, positions, cache, last)
    cache.length = mask.shape[1]
    return hidden[:, -1]

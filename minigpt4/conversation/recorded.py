"""One token more of each row, recorded once on an accelerator and replayed in one launch.

A card takes less time to compute a token than a host to ask for its thousand small operations. What is recorded works
on fixed tensors, so keys and values have a fixed room here, and rows that end are computed on and not looked at.

Shapes: B rows, S room for context and answer, H heads, G heads of keys and values, D width of a head, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt4.common import device as devices
from minigpt4.models.kv_cache import KVCache
from minigpt4.models.llama import Attend, Llama

_NUM_KEPT = 2  # recordings of a model that there are at most, each with room for keys and values
_MIN_TOKENS = 16  # of an answer that is worth recording for
_kept: WeakKeyDictionary[Llama, list["Steps"]] = WeakKeyDictionary()


def take(llm: Llama, cache: KVCache, mask: Tensor, num_tokens: int) -> "Steps | None":
    """Steps that go on behind what the LM has read, to be given back; None where the device records nothing.

    Args:
        llm: the LM.
        cache: what it has read of every row.
        mask: int64 [B, T] on the CPU, 0 on padding.
        num_tokens: that will be asked for at most.
    """
    if num_tokens < _MIN_TOKENS or not devices.records(llm.lm_head.weight.device):
        return None
    batch, size = 1 << (len(mask) - 1).bit_length(), room(mask.shape[1] + num_tokens)
    kept = _kept.setdefault(llm, [])
    steps = next((steps for steps in kept if steps.holds(llm, batch, size)), None)
    if steps is not None:
        kept.remove(steps)
    else:
        del kept[: len(kept) - _NUM_KEPT + 1]
        try:
            steps = Steps(llm, batch, size, cache.layers[0][0])
        except torch.OutOfMemoryError:  # the piecewise way needs no room of its own
            kept.clear()
            return None
    if steps.replay is None:
        return None
    steps.begin(cache, mask)
    return steps


def room(num_tokens: int) -> int:
    """S for a context and its answer: few different ones, so that what is recorded serves again."""
    return max(256, 1 << (num_tokens - 1).bit_length())


class Steps:
    """The state of rows and the recorded step that takes each one token further; also how their tokens attend.

    Args:
        llm: the LM.
        batch: B, of which any number may be in use.
        size: S.
        like: a tensor of the dtype, device and shape [_, G, _, D] of keys and values.
    """

    def __init__(self, llm: Llama, batch: int, size: int, like: Tensor) -> None:
        self.length = 0
        layers, (heads, width) = llm.config.num_hidden_layers, (like.shape[1], like.shape[3])
        self.layers = [[like.new_zeros(batch, heads, size, width) for _ in range(2)] for _ in range(layers)]
        self.mask = like.new_zeros(batch, 1, 1, size)  # added to the scores
        self.ids, self.positions = torch.zeros(2, batch, dtype=torch.long, device=like.device)
        self.column = self.ids.new_zeros(1)  # where the next keys and values go, in all rows
        self.rows = torch.arange(batch, device=like.device)  # those that are still asked for
        self.logits = torch.zeros(batch, llm.config.vocab_size, device=like.device)
        self._weights = self._place(llm)
        self.replay: Callable[[], None] | None = devices.record(partial(self._step, llm), like.device)

    @staticmethod
    def _place(llm: Llama) -> list[int]:
        return [tensor.data_ptr() for tensor in (*llm.parameters(), *llm.buffers())]

    def holds(self, llm: Llama, batch: int, size: int) -> bool:
        """Whether this was recorded of an LM where it is now, with as much room."""
        return self.mask.shape[::3] == (batch, size) and self._weights == self._place(llm)

    def begin(self, cache: KVCache, mask: Tensor) -> None:
        """Takes over what the LM has read."""
        batch, self.length = mask.shape
        for own, read in zip(self.layers, cache.layers, strict=True):
            for mine, part in zip(own, read, strict=True):
                mine.zero_()  # a mask hides numbers, but not what is none
                mine[:batch, :, : self.length] = part[:, :, : self.length]
        hidden = torch.full(self.mask.shape, -torch.inf)
        hidden[..., 0] = 0.0  # rows that nobody asks for look at something
        hidden[:batch, 0, 0, : self.length] = torch.where(mask == 0, -torch.inf, 0.0)
        self.mask.copy_(hidden)
        self.positions[:batch] = mask.sum(1).to(self.positions.device)
        self.column.fill_(self.length)
        self.rows = torch.arange(batch, device=self.ids.device)

    def feed_ids(self, ids: Tensor) -> Tensor:
        """The next id of each row that is asked for -> their logits, float32 [rows, V]."""
        self.ids.index_copy_(0, self.rows, ids)
        self.replay()
        self.length += 1
        return self.logits.index_select(0, self.rows)

    def reorder(self, rows: list[int]) -> None:
        """Goes on with the given ones of the rows that are asked for."""
        self.rows = self.rows[rows]

    def give_back(self, llm: Llama, cache: KVCache | None) -> None:
        """Ends; a single row's ``cache`` then has read what was fed."""
        if cache is not None:
            cache.layers = [tuple(part[:1, :, : self.length].clone() for part in parts) for parts in self.layers]
            cache.length = self.length
        kept = _kept.setdefault(llm, [])
        kept.append(self)
        del kept[:-_NUM_KEPT]

    def _step(self, llm: Llama) -> None:
        """Reads ``ids`` at ``positions`` into ``column``."""
        self.mask.index_fill_(3, self.column, 0.0)
        x = llm.model.embed_tokens(self.ids).unsqueeze(1)
        hidden = llm.model(x, self.positions.unsqueeze(1), self)
        self.logits.copy_(llm.lm_head(hidden.squeeze(1)))
        self.positions += 1
        self.column += 1

    def of_layer(self, number: int) -> Attend:
        """See ``llama.Attention``."""
        return partial(self._attend, *self.layers[number])

    def _attend(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of one token a row [B, 1, H, D] to all columns, of which the mask hides some: [B, 1, H, D]."""
        keys.index_copy_(2, self.column, key.transpose(1, 2))
        values.index_copy_(2, self.column, value.transpose(1, 2))
        query = query.squeeze(1).unflatten(1, (keys.shape[1], -1))  # heads that share keys stand where tokens would
        mixed = scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
        return mixed.flatten(1, 2).unsqueeze(1)

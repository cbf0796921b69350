"""Rows of different lengths through a Llama without padding, and with little kept for the backward pass.

Everything but attention works token by token: the tokens of all rows stand in one sequence [N, L]. Attention alone
lays them out in a grid [B, T], longest row T, where the padding on the right is never looked at by what stands left of
it, so that plain causal attention needs no mask. What all rows begin with is computed once and only attended to.

Shapes: B rows, T tokens of the longest, N tokens of all, P tokens of the prefix, H heads,
G heads of keys and values, D width of a head, L width of the LM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt4.models.kv_cache import KVCache, read
from minigpt4.models.llama import Attend, Llama


@dataclass
class Rows:
    """Where the tokens of B rows stand, and how they attend.

    Args:
        lengths: tokens of each row.
        wanted: numbers, among all tokens, of those whose last hidden state is asked for, int64 [n], rising, n < N.
        prefix: keys and values [1, G, P, D] of each layer for what stands before every row.
        device: of the tokens.
    """

    lengths: list[int]
    wanted: Tensor
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.longest = max(self.lengths)
        self.prefix_length = self.prefix[0][0].shape[2] if self.prefix else 0
        starts = (row * self.longest + torch.arange(length) for row, length in enumerate(self.lengths))
        self.places = torch.cat(list(starts)).to(self.device, non_blocking=True)  # [N] in the flat grid

        # bool [T, P + T]; without a prefix, attention needs none
        self.mask = torch.ones(self.longest, self.prefix_length + self.longest, dtype=torch.bool, device=self.device)
        self.mask = self.mask.tril(self.prefix_length) if self.prefix else None

    @property
    def positions(self) -> Tensor:
        """Position of each token in its row, prefix included, int64 [N]."""
        return self.places % self.longest + self.prefix_length

    def of_layer(self, number: int) -> Attend:
        """See ``llama.Attention``."""
        return partial(self._attend, self.prefix[number] if self.prefix else ())

    def _attend(self, before: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of each row's queries [N or n, H, D] to its keys and values [N, G, D]: [N or n, H, D]."""
        places = self.places if len(query) == len(key) else self.places[self.wanted]
        query, key, value = self._grid(query, places), self._grid(key, self.places), self._grid(value, self.places)
        if before:
            keys, values = (part.expand(len(self.lengths), -1, -1, -1) for part in before)
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        mixed = scaled_dot_product_attention(
            *(query, key, value),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, places)

    def _grid(self, packed: Tensor, places: Tensor) -> Tensor:
        """[N, H, D] to [B, H, T, D]; where no token stands it is zero."""
        grid = packed.new_zeros(len(self.lengths) * self.longest, *packed.shape[1:]).index_copy(0, places, packed)
        return grid.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)


@torch.inference_mode(False)  # they may be used in training later
@torch.no_grad()
def keys_and_values(llama: Llama, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What a frozen decoder keeps of a beginning: keys and values [1, G, P, D] of each layer."""
    embedding, cache = llama.model.embed_tokens, KVCache()
    embeds = embedding(torch.tensor([ids], device=embedding.weight.device))
    read(llama, embeds, torch.ones(1, len(ids), dtype=torch.long), cache)
    return cache.layers


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """Mean cross-entropy in float32 (scalar) of hidden states [n, L] through a frozen output layer [V, L].

    The gradient of the hidden states is computed along with the loss, a chunk of logits at a time.
    """
    return _Loss.apply(hidden, weight, targets, chunk)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = (part.to(weight.dtype) @ weight.T).float()
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, wanted[:, None])
            powers = logits.exp_()  # in place: there is one tensor [chunk, V]
            sums = powers.sum(1, keepdim=True)
            total += (sums.log() - right).sum()
            if ctx.needs_input_grad[0]:
                share = powers.div_(sums)  # the softmax
                share.scatter_add_(1, wanted[:, None], share.new_full((1, 1), -1.0).expand(len(wanted), 1))
                gradients.append((share.to(weight.dtype) @ weight).to(hidden.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).div_(len(targets)))
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None


def recompute_layers(llama: Llama) -> None:
    """Lets every layer keep its input alone for the backward pass and compute the rest again: less memory, slower."""
    from torch.utils.checkpoint import checkpoint

    def forward(plain: Callable[..., Tensor], *args: Any) -> Tensor:
        return checkpoint(plain, *args, use_reentrant=False) if torch.is_grad_enabled() else plain(*args)

    for layer in llama.model.layers:
        layer.forward = partial(forward, layer.forward)

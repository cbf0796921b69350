"""Attention of the frozen language model: packed training rows behind a shared prefix, and padded rows of a chat.

Everything but attention works token by token, so the tokens of all rows are stored one after the other, without
padding, after the prefix that all rows share. transformers' decoders call ``attention_forward``, registered under
``NAME``. Given a ``PackedBatch`` it lays the tokens out in a grid of whole rows, where right padding is invisible under
causal attention. Without one it is PyTorch's scaled dot-product attention, as transformers calls it.

Shapes: B rows, P tokens of the prefix, T tokens of the longest row after it, N tokens of prefix and all rows, H query
heads, G key and value heads, D width of a head, L width of the LM, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "minigpt4"
Heads = tuple[Tensor, Tensor, Tensor]  # query, key, value


class PackedBatch:
    """Positions of B rows of different lengths in one sequence of N tokens, which begins with what all rows begin with.

    Everything but attention computes those P tokens once, with exact gradients. Attention computes them for each row,
    so that it is plain causal attention of whole rows.

    Args:
        lengths: number of tokens of each row, without the prefix.
        prefix_length: P.
        device: of the tokens.
        hidden: positions of each row, from the end of the prefix, that nothing attends to, not even themselves.
    """

    def __init__(
        self,
        lengths: list[int],
        prefix_length: int = 0,
        device: torch.device | str = "cpu",
        hidden: Sequence[Sequence[int]] = (),
    ) -> None:
        self.lengths, self.prefix_length, self.device = lengths, prefix_length, device
        self.longest = max(lengths)
        prefix, width = torch.arange(prefix_length), prefix_length + self.longest
        own = [row * width + prefix_length + torch.arange(length) for row, length in enumerate(lengths)]
        slots, tokens = torch.cat((prefix, *own)), torch.zeros(len(lengths) * width, dtype=torch.long)
        tokens[slots] = torch.arange(len(slots))
        tokens.unflatten(0, (-1, width))[:, :prefix_length] = prefix
        self.tokens = tokens.to(device, non_blocking=True)  # of each slot of the grid [B * (P + T)]
        self.slots = slots.to(device, non_blocking=True)  # of each token [N], those of the prefix in row 0
        self.visible: Tensor | None = None  # bool [B, P + T], where something is hidden
        if any(hidden):
            self.visible = torch.ones(len(lengths), prefix_length + self.longest, dtype=torch.bool, device=device)
            for row, positions in enumerate(hidden):
                self.visible[row, [prefix_length + position for position in positions]] = False
        self._masks: dict[int, Tensor] = {}

    @property
    def position_ids(self) -> Tensor:
        """Position of each token in its row, prefix included, int64 [1, N]."""
        return (self.slots % (self.prefix_length + self.longest))[None]

    @property
    def padding_mask(self) -> Tensor:
        """Which slots of the grid hold a visible token, int64 [B, P + T]."""
        ends = self.prefix_length + torch.tensor(self.lengths)[:, None]
        mask = (torch.arange(self.prefix_length + self.longest) < ends).to(self.device)
        return (mask if self.visible is None else mask & self.visible).long()

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] to whole rows [B, P + T, ...]; padding holds some token, whose gradient there must be zero."""
        return _Unpack.apply(packed, self)

    def pack(self, grid: Tensor) -> Tensor:
        """[B, P + T, ...] to [N, ...]."""
        return grid.flatten(0, 1).index_select(0, self.slots)

    def mask(self, window: int | None = None) -> Tensor | None:
        """Which keys a query sees, bool [1 or B, 1, P + T, P + T]; None where it is plain causal attention."""
        length = self.prefix_length + self.longest
        window = min(window or length, length)
        if window == length and self.visible is None:
            return None
        if window not in self._masks:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.device).tril().triu(1 - window)
            self._masks[window] = mask if self.visible is None else mask & self.visible[:, None, None]
        return self._masks[window]

    def attend(self, heads: Heads, window: int | None, **settings: Any) -> Tensor:
        """Queries [1, H, N, D], keys and values [1, G, N, D] of a layer to [1, N, H, D]."""
        query, key, value = (self.unpack(part[0].transpose(0, 1)).transpose(1, 2) for part in heads)
        mask = self.mask(window)
        mixed, _ = _attention((query, key, value), mask, is_causal=mask is None, **settings)
        return self.pack(mixed.transpose(1, 2))[None]


class _Unpack(torch.autograd.Function):
    """One gather in each direction; PyTorch's own operations would add up zeros for each of the parts."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, batch: PackedBatch) -> Tensor:
        ctx.batch = batch
        return packed.index_select(0, batch.tokens).unflatten(0, (len(batch.lengths), -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total, prefix = ctx.batch.pack(gradient), ctx.batch.prefix_length
        total[:prefix] = gradient[:, :prefix].sum(0)
        return total, None


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' decoder layers call.

    Args:
        module: the layer's attention module.
        query: [B, H, T, D], rotary positions applied; with ``packed`` [1, H, N, D].
        key, value: [B, G, S, D], those of a cache included; with ``packed`` [1, G, N, D].
        attention_mask: bool [B or 1, 1, T, S] or None; not used with ``packed``.
        **settings: what transformers passes: ``scaling``, ``softcap`` (Gemma 2), ``sliding_window`` and others, and
            ``packed``, the PackedBatch of a training step.

    Returns:
        [B, T, H, D], and the attention weights [B, H, T, S] where ``output_attentions`` asks for them. Raises
        NotImplementedError if the architecture's attention has terms that packed rows do not support.
    """
    heads, packed = (query, key, value), settings.pop("packed", None)
    formula = {name: settings.get(name) for name in ("scaling", "softcap")}
    if packed is not None:
        if unsupported := [name for name in ("s_aux", "position_bias") if settings.get(name) is not None]:
            raise NotImplementedError(f"attention with {unsupported[0]} is not supported for packed rows")
        return packed.attend(heads, settings.get("sliding_window"), **formula), None
    if formula["softcap"] is None and not settings.get("output_attentions"):
        return sdpa_attention_forward(module, *heads, attention_mask, **settings)
    is_causal = attention_mask is None and query.shape[2] > 1
    mixed, weights = _attention(heads, attention_mask, is_causal, **formula, needs_weights=True)
    return mixed.transpose(1, 2), weights


def _attention(
    heads: Heads,
    mask: Tensor | None,
    is_causal: bool,
    scaling: float | None,
    softcap: float | None,
    needs_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[B, H, T, D] and [B, G, S, D] to [B, H, T, D]; by the formula where PyTorch's kernels do not compute it."""
    query, key, value = heads
    if softcap is None and not needs_weights:
        is_grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(*heads, mask, 0.0, is_causal, scale=scaling, enable_gqa=is_grouped), None
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value, weights


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def exclude_from_compilation() -> None:
    """Leaves attention out of compiled layers: it differs from layer to layer, which would compile each one anew."""
    AttentionInterface.register(NAME, torch.compiler.disable(attention_forward))


def next_token_loss(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int = 64) -> Tensor:
    """Mean cross-entropy (float32, scalar) of hidden states [n, L] and targets int64 [n] through a frozen output layer.

    The gradient of the hidden states is computed along with the loss, so that only the logits of ``chunk`` positions
    exist at a time; ``head`` maps hidden states [n, L] to logits [n, V].
    """
    return _ChunkedLoss.apply(hidden, head, targets, chunk)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                part = part.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = cross_entropy(head(part).float(), target, reduction="sum")
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(loss, part)
            total += loss.detach()
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).div_(len(targets)))
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (hidden_gradient,) = ctx.saved_tensors
        return hidden_gradient * gradient.to(hidden_gradient.dtype), None, None, None


def recompute_layers(layers: nn.ModuleList) -> None:
    """Gradient checkpointing of frozen decoder layers in place: less memory, a second forward of each layer.

    transformers' own switch works in training mode only, and a frozen LM stays in eval mode.
    """

    def forward(plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    for layer in layers:
        layer.forward = partial(forward, layer.forward)

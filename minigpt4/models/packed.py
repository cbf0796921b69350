"""Rows of different lengths through a Llama without padding, and with little kept for the backward pass.

Everything but attention works token by token: the tokens of all rows stand in one sequence [1, N, L]. Attention alone
lays them out in a grid [B, T], longest row T, where the padding on the right is never looked at by what stands left of
it, so that plain causal attention needs no mask. What all rows begin with is computed once and only attended to.

Shapes: B rows, T tokens of the longest, N tokens of all, P tokens of the prefix, H heads, D width of a head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention, silu

ATTENTION = "rows"  # the name under which transformers finds ``_attention``


@dataclass
class Rows:
    """Where the tokens of B rows stand.

    Args:
        lengths: tokens of each row.
        prefix: keys and values [1, H, P, D] of each layer for what stands before every row.
        device: of the tokens.
    """

    lengths: list[int]
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.longest = max(self.lengths)
        self.prefix_length = self.prefix[0][0].shape[2] if self.prefix else 0
        starts = (row * self.longest + torch.arange(length) for row, length in enumerate(self.lengths))
        self.places = torch.cat(list(starts)).to(self.device, non_blocking=True)  # [N] in the flat grid

    @property
    def positions(self) -> Tensor:
        """Position of each token in its row, prefix included, int64 [1, N]."""
        return (self.places % self.longest + self.prefix_length).unsqueeze(0)

    def spread(self, packed: Tensor) -> Tensor:
        """[1, H, N, D] to the grid [B, H, T, D]; what stands in the padding is zero."""
        grid = packed.new_zeros(len(self.lengths) * self.longest, packed.shape[1], packed.shape[3])
        grid = grid.index_copy(0, self.places, packed[0].transpose(0, 1))
        return grid.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)

    def gather(self, grid: Tensor) -> Tensor:
        """[B, H, T, D] to [1, N, H, D]."""
        return grid.transpose(1, 2).flatten(0, 1).index_select(0, self.places).unsqueeze(0)


def run(llama: nn.Module, embeds: Tensor, rows: Rows) -> Tensor:
    """The decoder's last hidden state [N, L] for packed inputs [N, L]."""
    no_mask = embeds.new_empty(1, 1, 1, 1)  # of four dimensions, so that transformers makes none
    output = llama.model(
        inputs_embeds=embeds.unsqueeze(0),
        attention_mask=no_mask,
        position_ids=rows.positions,
        use_cache=False,
        rows=rows,
    )
    return output.last_hidden_state[0]


@torch.inference_mode(False)  # they may be used in training later
@torch.no_grad()
def keys_and_values(llama: nn.Module, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What a frozen decoder keeps of a beginning: keys and values [1, H, P, D] of each layer."""
    from transformers import DynamicCache

    embedding, cache = llama.get_input_embeddings(), DynamicCache()
    embeds = embedding(torch.tensor([ids], device=embedding.weight.device))
    llama.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key, value = map(rows.spread, (query, key, value))
    mask = None
    if rows.prefix:
        before = [part.expand(len(rows.lengths), -1, -1, -1) for part in rows.prefix[module.layer_idx]]
        key, value = (torch.cat(parts, dim=2) for parts in zip(before, (key, value), strict=True))
        mask = causal_lower_right(query.shape[2], key.shape[2])
    is_grouped = query.shape[1] != key.shape[1]
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
    )
    return rows.gather(mixed), None


def register() -> None:
    """Makes the attention known to transformers; without rows it is transformers' own SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, wanted[:, None])).sum()
            if ctx.needs_input_grad[0]:
                share = logits.sub_(normalizer).exp_()  # the softmax, in place
                share.scatter_add_(1, wanted[:, None], share.new_full((1, 1), -1.0).expand(len(wanted), 1))
                gradients.append((share.to(weight.dtype) @ weight).to(hidden.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).div_(len(targets)))
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None


class GatedMLP(nn.Module):
    """Llama's MLP, which keeps two of its wide tensors for the backward pass instead of three."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """[..., L] -> [..., L]."""
        return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))


class _Gate(torch.autograd.Function):
    """silu(gate) * up; what silu gave is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, gradient * silu(gate)


def slim(llama: nn.Module) -> None:
    """Replaces a built Llama's norms and MLPs by ones that keep less; names of parameters and values stay."""
    for layer in llama.model.layers:
        if getattr(llama.config, "hidden_act", "") == "silu":
            layer.mlp = GatedMLP(layer.mlp)
    for module in list(llama.model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, device=child.weight.device)
                norm.weight = child.weight
                setattr(module, name, norm)

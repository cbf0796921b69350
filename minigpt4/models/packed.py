"""Rows of different lengths through a Llama without padding, and with little kept for the backward pass.

Everything but attention works token by token: the tokens of all rows stand in one sequence [1, N, L]. Attention alone
lays them out in a grid [B, T], longest row T, where the padding on the right is never looked at by what stands left of
it, so that plain causal attention needs no mask. What all rows begin with is computed once and only attended to.

Shapes: B rows, T tokens of the longest, N tokens of all, P tokens of the prefix, H heads, D width of a head.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

ATTENTION = "rows"  # the name under which transformers finds ``_attention``


@dataclass
class Rows:
    """Where the tokens of B rows stand.

    Args:
        lengths: tokens of each row.
        wanted: numbers, among all tokens, of those whose last hidden state is asked for, int64 [n].
        prefix: keys and values [1, H, P, D] of each layer for what stands before every row.
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
        """Position of each token in its row, prefix included, int64 [1, N]."""
        return (self.places % self.longest + self.prefix_length).unsqueeze(0)

    def spread(self, packed: Tensor, places: Tensor) -> Tensor:
        """[1, H, N, D] to the grid [B, H, T, D]; where no token stands it is zero."""
        grid = packed.new_zeros(len(self.lengths) * self.longest, packed.shape[1], packed.shape[3])
        grid = grid.index_copy(0, places, packed[0].transpose(0, 1))
        return grid.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)

    def gather(self, grid: Tensor, places: Tensor) -> Tensor:
        """[B, H, T, D] to [1, N, H, D]."""
        return grid.transpose(1, 2).flatten(0, 1).index_select(0, places).unsqueeze(0)


def run(llama: nn.Module, embeds: Tensor, rows: Rows) -> Tensor:
    """The decoder's last hidden states [n, L] of the wanted ones among packed inputs [N, L]."""
    no_mask = embeds.new_empty(1, 1, 1, 1)  # of four dimensions, so that transformers makes none
    output = llama.model(
        inputs_embeds=embeds.unsqueeze(0),
        attention_mask=no_mask,
        position_ids=rows.positions,
        use_cache=False,
        rows=rows,
    )
    hidden = output.last_hidden_state[0]
    return hidden if len(hidden) == len(rows.wanted) else hidden[rows.wanted]


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
    # The last layer asks for the wanted tokens alone.
    places = rows.places if query.shape[2] == key.shape[2] else rows.places[rows.wanted]
    query, key, value = rows.spread(query, places), rows.spread(key, rows.places), rows.spread(value, rows.places)
    mask = None
    if rows.prefix:
        before = [part.expand(len(rows.lengths), -1, -1, -1) for part in rows.prefix[module.layer_idx]]
        key, value = (torch.cat(parts, dim=2) for parts in zip(before, (key, value), strict=True))
        mask = rows.mask
    is_grouped = query.shape[1] != key.shape[1]
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
    )
    return rows.gather(mixed, places), None


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


def _last_layer(
    layer: nn.Module,
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    rows: Rows | None = None,
    **kwargs: Any,
) -> Tensor:
    """A Llama layer after which only the wanted tokens go on: [1, N, L] to [1, n, L]; all of them without rows."""
    if rows is None:
        return type(layer).forward(layer, hidden, position_embeddings=position_embeddings, **kwargs)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    wanted = normed.index_select(1, rows.wanted)
    query, key, value = (
        linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for linear, x in ((attention.q_proj, wanted), (attention.k_proj, normed), (attention.v_proj, normed))
    )
    cos, sin = position_embeddings
    key = apply_rotary_pos_emb(key, key, cos, sin)[1]
    cos, sin = cos.index_select(1, rows.wanted), sin.index_select(1, rows.wanted)
    query = apply_rotary_pos_emb(query, query, cos, sin)[0]
    mixed, _ = _attention(attention, query, key, value, None, attention.scaling, rows)
    hidden = hidden.index_select(1, rows.wanted) + attention.o_proj(mixed.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def slim(llama: nn.Module) -> None:
    """Lets a built Llama compute and keep less in training; names of parameters and values stay."""
    for layer in llama.model.layers:
        if getattr(llama.config, "hidden_act", "") == "silu":
            layer.mlp = GatedMLP(layer.mlp)
    for module in list(llama.model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, device=child.weight.device)
                norm.weight = child.weight
                setattr(module, name, norm)
    last = llama.model.layers[-1]
    if type(last).__name__ == "LlamaDecoderLayer":
        last.forward = partial(_last_layer, last)


def recompute_layers(llama: nn.Module) -> None:
    """Lets every layer keep its input alone for the backward pass and compute the rest again: less memory, slower."""
    for layer in llama.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

"""Llama (Touvron et al., 2023): the decoder that Vicuna is, with the names of its published weights.

It is frozen wherever it is used here, and is asked in three ways: rows of a training batch, a chat that is read, and
one token more of each row. They differ in attention alone, so whoever calls brings it.

Shapes: tokens stand in any leading dimensions "…"; L width, I width of the MLP, H heads, G heads of keys and values,
D width of a head, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

MAX_LAYERS = 1000  # that a config.json may ask for; building them takes time whatever the files hold

# (queries […, H, D], keys and values of the new tokens […, G, D]) -> mixed values […, H, D].
# The last layer may ask with fewer queries: those of the wanted tokens.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(Protocol):
    """How tokens attend, which a caller of the decoder brings."""

    def of_layer(self, number: int) -> Attend:
        """For one layer, with what is kept of it: layers differ in tensors, not in numbers to compile for."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants, by their names in config.json; the defaults are those of a file that leaves them out."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 32000
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type in (int, int | None)):
            if (value := getattr(self, name)) is None and name in ("num_key_value_heads", "head_dim"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                told = f"{value:,}" if isinstance(value, int) else repr(value)[:50]
                raise ValueError(f"config.json says {name} {told}; expected a number of a model")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"config.json asks for {self.num_hidden_layers:,} layers")
        if self.hidden_act != "silu":
            raise ValueError(f"config.json says hidden_act {self.hidden_act!r:.50}; expected 'silu', Llama's")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"config.json says {self.num_attention_heads} heads of {self.head_dim}, {self.num_key_value_heads} of "
                "them with keys; expected a multiple, of an even width"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < 1e30:
                raise ValueError(f"config.json says {name} {value!r:.50}; expected a number above 0")
        if not (self.frequencies() > 0).all() or not self.frequencies().isfinite().all():
            raise ValueError(f"config.json says rope_scaling {self.rope_scaling!s:.100}, which no position survives")

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "LlamaConfig":
        """From the content of a config.json, of today's form or older; ValueError where it describes no Llama."""
        if content.get("model_type") != "llama":
            kind = str(content.get("model_type"))[:50]
            raise ValueError(f"config.json describes a '{kind}'; expected a language model of Llama's family")
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        if isinstance(rope := content.get("rope_parameters"), Mapping):  # as transformers 5 writes both together
            known |= {"rope_scaling": rope} | {key: rope[key] for key in ("rope_theta",) if key in rope}
        return cls(**known)

    def frequencies(self) -> Tensor:
        """How far a pair of a head's numbers turns from one position to the next, float32 [D / 2]."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float()
        plain = 1.0 / self.rope_theta ** (steps / self.head_dim)
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else scaling
        try:
            if kind == "default":
                return plain
            factor = float(scaling["factor"])
            if kind == "linear":
                return plain / factor
            if kind == "llama3":  # waves longer than the trained context are stretched, short ones stay
                low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
                turns = float(scaling["original_max_position_embeddings"]) * plain / (2 * torch.pi)
                share = ((turns - low) / (high - low)).clamp(0, 1)
                return (1 - share) * plain / factor + share * plain
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"config.json's rope_scaling lacks a number for '{kind}' ({error})") from error
        raise ValueError(f"config.json says rope_scaling {str(kind)[:50]!r}; expected default, linear or llama3")


class Llama(nn.Module):
    """The decoder with its output layer [V, L]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Lets embeddings and output layer share their weights, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class Decoder(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies = {torch.device("cpu"): config.frequencies()}  # they are in no file, and on no meta device

    def forward(self, x: Tensor, positions: Tensor, attention: Attention, wanted: Tensor | None = None) -> Tensor:
        """Embeddings […, N, L] at positions […, N] to last hidden states, of all tokens or of the wanted ones.

        Args:
            x: what stands there.
            positions: int64.
            attention: see there.
            wanted: int64 [n], numbers in the last of the leading dimensions: […, n, L] comes out.
        """
        rotary = self._rotary(positions, x)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, attention.of_layer(number), wanted if number == last else None)
        return self.norm(x)

    def _rotary(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the signs of a rotation, […, N, 1, D], in the precision of ``x``."""
        if (frequencies := self._frequencies.get(x.device)) is None:
            frequencies = self._frequencies[x.device] = self._frequencies[torch.device("cpu")].to(x.device)
        angles = positions[..., None, None] * frequencies
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat([cosines, cosines], -1).to(x.dtype), torch.cat([-sines, sines], -1).to(x.dtype)


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside what goes past."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Projections(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """[…, N, L] to the same, or to […, n, L] of the wanted tokens, which look at all."""
        mixed = self.self_attn(self.input_layernorm(x), rotary, attend, wanted)
        x = (x if wanted is None else x.index_select(-2, wanted)) + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class Projections(nn.Module):
    """Projections and rotary positions (Su et al., 2021) around an attention that the caller brings."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        linear = partial(nn.Linear, bias=config.attention_bias)
        own, shared = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = linear(config.hidden_size, own)
        self.k_proj = linear(config.hidden_size, shared)
        self.v_proj = linear(config.hidden_size, shared)
        self.o_proj = linear(own, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None) -> Tensor:
        """[…, N, L] to […, N or n, L]."""
        asking, turn = x, rotary
        if wanted is not None:
            asking, turn = x.index_select(-2, wanted), [table.index_select(-3, wanted) for table in rotary]
        query = _rotated(self._heads(self.q_proj, asking), *turn)
        key = _rotated(self._heads(self.k_proj, x), *rotary)
        mixed = attend(query, key, self._heads(self.v_proj, x))
        return self.o_proj(mixed.flatten(-2))

    def _heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.head_dim))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Heads […, H, D] turned by their positions; the first half of a head's numbers pairs with the second."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


class MLP(nn.Module):
    """The gated MLP, which keeps two of its wide tensors for the backward pass instead of three."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=config.mlp_bias)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[…, L] -> […, L]."""
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

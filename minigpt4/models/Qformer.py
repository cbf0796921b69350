"""The Q-Former of BLIP-2 (Li et al., 2023), query branch only, with the published parameter names.

A BERT encoder (post-norm) whose input is a set of learned queries; every ``cross_attention_freq``-th layer, starting
with layer 0, also attends to the image tokens.

Shapes: B batch, Q queries, H hidden width, N image tokens, W width of the image tokens.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from minigpt4.common.schema import QFormerSettings


@dataclass(frozen=True)
class QFormerConfig(QFormerSettings):
    """The Q-Former's architecture with the values that are no configuration keys; ``encoder_width`` is W."""

    encoder_width: int = 1408
    dropout: float = 0.1  # active only while the Q-Former is trained
    layer_norm_eps: float = 1e-12


class QFormerOutput(NamedTuple):
    """Output of ``Bert``: ``last_hidden_state`` [B, Q, H], also as ``output[0]``."""

    last_hidden_state: Tensor


class Attention(nn.Module):
    """Multi-head attention without its output layer: [B, Q, H] attends to ``context`` and gives [B, Q, H]."""

    def __init__(self, config: QFormerConfig, context_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(context_width, config.hidden_size)
        self.value = nn.Linear(context_width, config.hidden_size)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """``context`` is [B, N, W]; ``mask`` [B, 1, 1, N] (bool) is true where it is visible."""
        parts = self.query(hidden), self.key(context), self.value(context)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts]  # [B, heads, tokens, H / heads]
        dropout = self.dropout if self.training else 0.0
        return scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """The last step of each BERT sub-layer: linear, dropout, residual, LayerNorm."""

    def __init__(self, config: QFormerConfig, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, update: Tensor, residual: Tensor) -> Tensor:
        """[B, Q, width_in] and [B, Q, H] to [B, Q, H]."""
        return self.LayerNorm(self.dropout(self.dense(update)) + residual)


class AttentionBlock(nn.Module):
    """Attention with its output layer, with BERT's attribute names ``self`` and ``output``."""

    def __init__(self, config: QFormerConfig, context_width: int) -> None:
        super().__init__()
        self.self = Attention(config, context_width)
        self.output = AddNorm(config, config.hidden_size)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``Attention``."""
        return self.output(self.self(hidden, context, mask), hidden)


class Layer(nn.Module):
    """Self-attention, cross-attention (in some layers), MLP."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, config.hidden_size)
        self.crossattention = AttentionBlock(config, config.encoder_width) if has_cross_attention else None
        dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_query = nn.Sequential(OrderedDict(dense=dense, gelu=nn.GELU()))
        self.output_query = AddNorm(config, config.intermediate_size)

    def forward(self, hidden: Tensor, image_tokens: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """As ``Attention``."""
        hidden = self.attention(hidden, hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, image_tokens, image_mask)
        return self.output_query(self.intermediate_query(hidden), hidden)


class Bert(nn.Module):
    """Embeddings and layers; the text branch with its word and position embeddings is absent."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embeddings = nn.Sequential(OrderedDict(LayerNorm=norm, dropout=nn.Dropout(config.dropout)))
        layers = (Layer(config, i % config.cross_attention_freq == 0) for i in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self,
        *,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> QFormerOutput:
        """Encodes queries [B, Q, H] given image tokens [B, N, W], by the reference's names.

        ``encoder_attention_mask`` [B, N] hides image tokens where it is 0; each row needs at least one visible token.
        ``return_dict`` has no effect, as the named tuple that is returned has both forms.
        """
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]
        hidden = self.embeddings(query_embeds)
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, encoder_hidden_states, mask)
        return QFormerOutput(hidden)


class QFormer(nn.Module):
    """Queries [B, Q, H] and image tokens [B, N, W] to query outputs [B, Q, H]; initialised as BERT."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, query_embeds: Tensor, image_tokens: Tensor) -> Tensor:
        """Returns the last hidden state of the queries."""
        return self.bert(query_embeds=query_embeds, encoder_hidden_states=image_tokens).last_hidden_state

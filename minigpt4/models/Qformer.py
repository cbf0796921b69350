"""The Q-Former of BLIP-2 (Li et al., 2023), query branch only, under the published parameter names.

A BERT encoder (post-norm) whose input is a set of learned queries; every ``cross_attention_freq``-th layer,
from layer 0 on, also attends to the image tokens.

Shapes: B batch, Q queries, H hidden width, N image tokens, W width of the image tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class QFormerConfig:
    """BERT-base widths. ``encoder_width`` is the width W of the image tokens."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_freq: int = 2
    encoder_width: int = 1408
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12


class Attention(nn.Module):
    """Projections and multi-head attention, without the output layer: [B, Q, H] x [B, N, W] -> [B, Q, H]."""

    def __init__(self, config: QFormerConfig, context_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(context_width, config.hidden_size)
        self.value = nn.Linear(context_width, config.hidden_size)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Lets ``hidden`` [B, Q, H] attend to ``context`` [B, N, W]."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, tokens, H / heads]

        mixed = scaled_dot_product_attention(
            heads(self.query(hidden)),
            heads(self.key(context)),
            heads(self.value(context)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return mixed.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """BERT's closing step of every sub-layer: dense, dropout, residual, LayerNorm."""

    def __init__(self, config: QFormerConfig, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, update: Tensor, residual: Tensor) -> Tensor:
        """Both [B, Q, *] in, [B, Q, H] out."""
        return self.LayerNorm(self.dropout(self.dense(update)) + residual)


class AttentionBlock(nn.Module):
    """Attention with its output layer, under BERT's names ``self`` and ``output``."""

    def __init__(self, config: QFormerConfig, context_width: int) -> None:
        super().__init__()
        self.self = Attention(config, context_width)
        self.output = AddNorm(config, config.hidden_size)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """[B, Q, H] attending to [B, N, W], gives [B, Q, H]."""
        return self.output(self.self(hidden, context), hidden)


class Intermediate(nn.Module):
    """The widening half of the MLP, with the exact (erf) GELU."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, H] -> [B, Q, intermediate]."""
        return nn.functional.gelu(self.dense(hidden))


class Layer(nn.Module):
    """Self-attention, cross-attention where this layer has it, MLP."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, config.hidden_size)
        self.crossattention = AttentionBlock(config, config.encoder_width) if has_cross_attention else None
        self.intermediate_query = Intermediate(config)
        self.output_query = AddNorm(config, config.intermediate_size)

    def forward(self, hidden: Tensor, image_tokens: Tensor) -> Tensor:
        """[B, Q, H] with image tokens [B, N, W], gives [B, Q, H]."""
        hidden = self.attention(hidden, hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, image_tokens)
        return self.output_query(self.intermediate_query(hidden), hidden)


class Embeddings(nn.Module):
    """The queries pass a LayerNorm before the first layer; words and positions belong to the unused text branch."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query_embeds: Tensor) -> Tensor:
        """[B, Q, H] -> [B, Q, H]."""
        return self.dropout(self.LayerNorm(query_embeds))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, has_cross_attention=i % config.cross_attention_freq == 0)
            for i in range(config.num_hidden_layers)
        )

    def forward(self, hidden: Tensor, image_tokens: Tensor) -> Tensor:
        """[B, Q, H] with image tokens [B, N, W], gives [B, Q, H]."""
        for layer in self.layer:
            hidden = layer(hidden, image_tokens)
        return hidden


class Bert(nn.Module):
    """Embeddings and encoder, the part that the published file calls ``Qformer.bert``."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)


class QFormer(nn.Module):
    """Queries [B, Q, H] and image tokens [B, N, W] to query outputs [B, Q, H].

    Built with the initialisation of BERT (normal, std 0.02; LayerNorm at identity); reads no file.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, query_embeds: Tensor, image_tokens: torch.Tensor) -> Tensor:
        """Returns the last hidden state of the queries."""
        return self.bert.encoder(self.bert.embeddings(query_embeds), image_tokens)

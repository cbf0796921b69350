"""The loss of each of several texts after one prompt, whose images and tokens are computed once for all of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from minigpt4.models import language_model as lm
from minigpt4.models.growing_cache import new_cache
from minigpt4.models.packed_attention import PackedBatch
from minigpt4.models.text_rows import IGNORE_INDEX, TextRow

if TYPE_CHECKING:
    from minigpt4.models.mini_gpt4 import MiniGPT4

_CHUNK = 64  # positions whose logits exist at a time


@torch.inference_mode()
def candidate_losses(model: "MiniGPT4", rows: Sequence[TextRow], image_embeds: Tensor | None) -> list[float]:
    """The summed loss over the targets of each row, in nats; the beginning that all rows share is computed once.

    Args:
        model: in eval mode.
        rows: of one prompt and a candidate each, as ``tokenize_rows`` returns them; at least one target each.
        image_embeds: the images [n, Q, L] of the prompt, in order.
    """
    first_targets = [next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX) for row in rows]
    # The position before a target predicts it, so it is computed for each row.
    start = min(min(first_targets) - 1, _num_common([row.ids for row in rows])) if model.packs_rows else 0
    ids = [torch.tensor([row.ids], device=model.device) for row in rows]
    embeds = [model.embed_inputs(row, image_embeds)[0, :] for row in ids]
    prefix = _prefill(model, embeds[0][None, :start]) if start else []
    batch = PackedBatch([len(row.ids) - start for row in rows], prefix, model.device)
    hidden = lm.last_hidden_states(
        model.llama_model, torch.cat([row[start:] for row in embeds]), batch, model.packs_rows
    )
    labels = [torch.tensor([*row.labels[start + 1 :], IGNORE_INDEX], device=model.device) for row in rows]
    head = lm.lm_head(model.llama_model)
    pairs = zip(hidden.split(_CHUNK), torch.cat(labels).split(_CHUNK), strict=True)
    losses = [
        cross_entropy(head(part).float(), target, ignore_index=IGNORE_INDEX, reduction="none") for part, target in pairs
    ]
    return [own.sum().item() for own in torch.cat(losses).split([len(own) for own in labels])]


def _num_common(rows: Sequence[Sequence[int]]) -> int:
    """How many leading ids all rows have in common."""
    length = 0
    for ids in zip(*rows, strict=False):
        if len(set(ids)) > 1:
            break
        length += 1
    return length


def _prefill(model: "MiniGPT4", embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, G, P, D] of each layer for embeddings [1, P, L]."""
    cache = new_cache()
    lm.next_token_logits(model.llama_model, embeds, torch.ones(embeds.shape[:2], dtype=torch.long), cache)
    return [(layer.keys, layer.values) for layer in cache.layers]

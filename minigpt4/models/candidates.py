"""The loss of each of several texts after one prompt, whose images and tokens are computed once for all of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from minigpt4.models import language_model as lm
from minigpt4.models.packed_attention import PackedBatch
from minigpt4.models.text_rows import IGNORE_INDEX, TextRow, shared_length

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
    shared = shared_length(rows, has_same_images=True) if model.packs_rows else 0
    ids = [torch.tensor([row.ids], device=model.device) for row in rows]
    embeds = [model.embed_inputs(row, image_embeds)[0] for row in ids]
    packed = torch.cat([embeds[0][:shared], *(row[shared:] for row in embeds)])
    batch = PackedBatch([len(row.ids) - shared for row in rows], shared, model.device)
    hidden = lm.last_hidden_states(model.llama_model, packed, batch, model.packs_rows)[shared:]
    labels = [torch.tensor([*row.labels[shared + 1 :], IGNORE_INDEX], device=model.device) for row in rows]
    head = lm.lm_head(model.llama_model)
    pairs = zip(hidden.split(_CHUNK), torch.cat(labels).split(_CHUNK), strict=True)
    losses = [
        cross_entropy(head(part).float(), target, ignore_index=IGNORE_INDEX, reduction="none") for part, target in pairs
    ]
    return [own.sum().item() for own in torch.cat(losses).split([len(own) for own in labels])]

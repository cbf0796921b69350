"""Keys and values of chats that may go on: a turn then costs only its own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from minigpt4.conversation.generation import copy_cache
from minigpt4.models.language_model import new_cache
from minigpt4.models.mini_gpt4 import IMAGE_TOKEN_INDEX


@dataclass
class Prefix:
    """What an LM has read: ids with image slots, the images [1, Q, L] in them, keys and values of every position."""

    ids: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=new_cache)

    def shared(self, ids: Sequence[int], images: Sequence[Tensor]) -> int:
        """How many positions at the head of another context are the same, images included."""
        length, slots = 0, 0
        for mine, other in zip(self.ids, ids, strict=False):
            if mine != other:
                break
            if mine == IMAGE_TOKEN_INDEX:
                number, place = divmod(slots, self.images[0].shape[1])
                if place == 0 and not torch.equal(self.images[number], images[number]):
                    break
                slots += 1
            length += 1
        return length

    def head(self, length: int) -> "Prefix":
        """The first ``length`` positions, nothing copied; this prefix stays as it is, whoever reads on."""
        cache = copy_cache(self.cache)
        cache.crop(length - cache.get_seq_length())
        return Prefix(self.ids[:length], self.images, cache)


class PrefixCache:
    """The most recent chats of an LM, found by what they say, so that nobody has to carry a handle around.

    Args:
        num_chats: how many are kept; at 7B and 2,000 tokens each takes 1 GB. 0 keeps none.
    """

    def __init__(self, num_chats: int = 4) -> None:
        self.num_chats = num_chats
        self._kept: list[Prefix] = []  # the latest at the end

    def take(self, ids: Sequence[int], images: Sequence[Tensor]) -> Prefix:
        """The longest head of a context that is kept; the chat that it continues is taken out until it is put back.

        At least the last position of ``ids`` is left to read, as its logits are wanted.
        """
        lengths = [min(prefix.shared(ids, images), len(ids) - 1) for prefix in self._kept]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if best is None or not lengths[best]:
            return Prefix()
        prefix = self._kept[best]
        head = prefix.head(lengths[best])
        has_all_images = head.ids.count(IMAGE_TOKEN_INDEX) == prefix.ids.count(IMAGE_TOKEN_INDEX)
        if has_all_images and 2 * len(head.ids) > len(prefix.ids):  # else it shares a system text and goes on beside it
            del self._kept[best]
        return head

    def put(self, prefix: Prefix, ids: Sequence[int], images: Sequence[Tensor]) -> None:
        """Keeps a chat; ``ids`` are all its tokens, of which its cache may lack the last ones."""
        prefix.ids, prefix.images = list(ids[: prefix.cache.get_seq_length()]), list(images)
        self._kept.append(prefix)
        del self._kept[: max(0, len(self._kept) - self.num_chats)]

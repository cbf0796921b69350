"""Key-value caches of recent chats: the next turn of a chat then prefills its new tokens only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from minigpt4.models.growing_cache import copy_cache, new_cache
from minigpt4.models.mini_gpt4 import IMAGE_TOKEN_INDEX


@dataclass(eq=False)
class Prefix:
    """A context that was prefilled: token ids with image indices, the images [1, Q, L], keys and values, its owner."""

    ids: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=new_cache)
    owner: str = ""

    def common_length(self, ids: Sequence[int], images: Sequence[Tensor]) -> int:
        """Number of leading positions that another context shares, images included."""
        length, num_image_ids = 0, 0
        for own, other in zip(self.ids, ids, strict=False):
            if own != other:
                break
            if own == IMAGE_TOKEN_INDEX:
                number, query = divmod(num_image_ids, self.images[0].shape[1])
                if query == 0 and not torch.equal(self.images[number], images[number]):
                    break
                num_image_ids += 1
            length += 1
        return length


class PrefixCache:
    """Prefixes of the most recent chats, looked up by content, so that callers need no handle.

    Args:
        num_chats: capacity; with a 7B model and 2,000 tokens each takes 1 GB. 0 stores nothing.
        max_tokens: of all chats together.
    """

    def __init__(self, num_chats: int = 4, max_tokens: float = math.inf) -> None:
        self.num_chats, self.max_tokens = num_chats, max_tokens
        self._prefixes: list[Prefix] = []  # the latest at the end

    def __len__(self) -> int:
        return len(self._prefixes)

    def clear(self) -> None:
        """Forgets all chats."""
        self._prefixes.clear()

    def take(self, ids: Sequence[int], images: Sequence[Tensor], owner: str = "") -> Prefix:
        """The owner's longest cached prefix of a context, or an empty one; at least the last position is left.

        A chat that the context continues is removed until ``put`` stores it again. One that shares only its beginning,
        such as the system text, stays, and the caller gets a copy.
        """
        length, prefix = self._find(ids, images, owner)
        if prefix is None:
            return Prefix(owner=owner)
        has_all_images = ids[:length].count(IMAGE_TOKEN_INDEX) == prefix.ids.count(IMAGE_TOKEN_INDEX)
        if not has_all_images or 2 * length <= len(prefix.ids):
            return Prefix(prefix.ids[:length], prefix.images, copy_cache(prefix.cache, positions=slice(length)), owner)
        self._prefixes.remove(prefix)
        if length < len(prefix.ids):
            prefix.cache.crop(length - len(prefix.ids))
        return Prefix(prefix.ids[:length], prefix.images, prefix.cache, owner)

    def cached_length(self, ids: Sequence[int], images: Sequence[Tensor], owner: str = "") -> int:
        """The length of the prefix that ``take`` would return."""
        return self._find(ids, images, owner)[0]

    def _find(self, ids: Sequence[int], images: Sequence[Tensor], owner: str) -> tuple[int, Prefix | None]:
        own = [prefix for prefix in self._prefixes if prefix.owner == owner]
        lengths = [min(prefix.common_length(ids, images), len(ids) - 1) for prefix in own]
        length = max(lengths, default=0)
        return length, own[lengths.index(length)] if length else None

    def put(self, prefix: Prefix, ids: Sequence[int], images: Sequence[Tensor]) -> None:
        """Stores a chat; ``ids`` are all its tokens, of which the last ones may be missing in its cache."""
        prefix.ids, prefix.images = list(ids[: prefix.cache.get_seq_length()]), list(images)
        self._prefixes.append(prefix)
        while len(self) > self.num_chats or sum(len(prefix.ids) for prefix in self._prefixes) > self.max_tokens:
            del self._prefixes[0]

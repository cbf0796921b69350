"""The processors of BLIP-2 that MiniGPT-4 uses."""

import re
from collections.abc import Mapping, Sequence
from math import log, sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.registry import registry
from minigpt4.processors.pictures import Pictures, resizes_alike

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _ImageProcessor:
    """PIL RGB image to float32 [3, S, S], normalised per channel.

    Called with an image it does everything at once. For training, ``crop`` and ``pack`` do a loader worker's part and
    ``Pictures.on`` the device's; the numbers are the same.

    Args:
        image_size: S.
        mean, std: of each channel, from 0 to 1.
        draft: JPEGs far larger than S are decoded at 1/2, 1/4 or 1/8 of their size: faster, other pixels and crops.
    """

    def __init__(
        self,
        image_size: int = 224,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        draft: bool = False,
    ) -> None:
        self.image_size = image_size
        self.mean, self.std = tuple(mean or MEAN), tuple(std or STD)
        self.draft = draft

    def __call__(self, image: Image.Image) -> Tensor:
        """Processes one image."""
        return self.pack([self.crop(image)]).on("cpu")[0]

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of an image that is used, resized unless the device could do that as well."""
        part = self.part(image)
        return part if resizes_alike(part.height, part.width, self.image_size) else self._resize(part)

    def part(self, image: Image.Image) -> Image.Image:
        """The part of an image that is used, in its own size."""
        raise NotImplementedError

    def smallest_side(self, width: int, height: int) -> float:
        """The shortest side that ``part`` can have of an image of this size, in pixels."""
        raise NotImplementedError

    def pack(self, crops: Sequence[Image.Image], resizes_later: bool = False) -> Pictures:
        """A batch for the device, of what ``crop`` gave; resized there with ``resizes_later``, else here."""
        images = crops if resizes_later else [self._resize(crop) for crop in crops]
        return Pictures.pack(images, self.image_size, self.mean, self.std)

    def draft_size(self, width: int, height: int) -> tuple[int, int]:
        """The width and height that a JPEG of this size must keep, so that no part of it has to be enlarged."""
        shrink = self.image_size / self.smallest_side(width, height) if self.draft else 1.0
        return int(width * shrink), int(height * shrink)

    def _resize(self, image: Image.Image) -> Image.Image:
        return image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "_ImageProcessor":
        """From the constructor's arguments by name, all optional."""
        return cls(**_arguments(cfg))


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(_ImageProcessor):
    """A random crop of ``min_scale`` to ``max_scale`` of the area, resized bicubically. Uses torch's random state."""

    RATIO = (3 / 4, 4 / 3)

    def __init__(self, image_size: int = 224, min_scale: float = 0.5, max_scale: float = 1.0, **settings: Any) -> None:
        super().__init__(image_size, **settings)
        self.scale = min_scale, max_scale

    def part(self, image: Image.Image) -> Image.Image:
        """A random rectangle, by the draws of torchvision's RandomResizedCrop."""
        for _ in range(10):
            area = image.width * image.height * torch.empty(1).uniform_(*self.scale).item()
            ratio = torch.empty(1).uniform_(*map(log, self.RATIO)).exp().item()
            width, height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
            if 0 < width <= image.width and 0 < height <= image.height:
                top = torch.randint(image.height - height + 1, (1,)).item()
                left = torch.randint(image.width - width + 1, (1,)).item()
                return image.crop((left, top, left + width, top + height))
        # None fits: the middle, as much of it as keeps within the ratios.
        width = min(image.width, round(image.height * self.RATIO[1]))
        height = min(image.height, round(image.width / self.RATIO[0]))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def smallest_side(self, width: int, height: int) -> float:
        """That of the smallest and most oblong rectangle, or of the middle where none fits."""
        return min(width, height, sqrt(self.scale[0] * self.RATIO[0] * width * height))


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(_ImageProcessor):
    """The whole picture, resized bicubically to a square."""

    def part(self, image: Image.Image) -> Image.Image:
        """All of it."""
        return image

    def smallest_side(self, width: int, height: int) -> float:
        """The picture's own."""
        return min(width, height)


@registry.register_processor("blip_caption")
class BlipCaptionProcessor:
    """Lower case, no punctuation marks, single spaces, at most ``max_words`` words, an optional prompt in front."""

    def __init__(self, prompt: str = "", max_words: int = 50) -> None:
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        """Cleans one caption."""
        text = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        words = text.split(" ")
        return self.prompt + " ".join(words[: self.max_words])

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "BlipCaptionProcessor":
        """From ``prompt`` and ``max_words``, both optional."""
        return cls(**_arguments(cfg))


def _arguments(cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (cfg or {}).items() if name != "name"}

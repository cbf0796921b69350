"""The image and caption processors of BLIP-2, built from torchvision's transforms.

Images become float32 [3, S, S]: resized bicubically by Pillow, scaled to 0..1, normalised per channel.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from torchvision import transforms

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.processors.base_processor import BaseProcessor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = transforms.InterpolationMode.BICUBIC


class BlipImageBaseProcessor(BaseProcessor):
    """Base of image processors: ``normalize`` subtracts ``mean`` and divides by ``std``, per channel and for 0..1."""

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean or MEAN), tuple(std or STD)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(
                f"Image processor: mean is {list(self.mean)} and std is {list(self.std)}; expected three numbers each, "
                "those of std above 0."
            )
        self.normalize = transforms.Normalize(self.mean, self.std)


class _BuiltIn(BaseProcessor):
    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "_BuiltIn":
        """Builds from a section with the constructor's arguments, all optional; UserError for unknown keys."""
        settings = {key: value for key, value in (cfg or {}).items() if key != "name"}
        try:
            inspect.signature(cls).bind(**settings)
        except TypeError as error:
            known = ", ".join(inspect.signature(cls).parameters)
            raise UserError(f"Processor {cls.__name__}: {error}; its keys are {known}.") from None
        return cls(**settings)


class _Blip2ImageProcessor(_BuiltIn, BlipImageBaseProcessor):
    """PIL RGB image to float32 [3, S, S].

    Args:
        resize: the first transform, to S x S pixels.
        image_size: S.
        draft: allow large JPEGs to be decoded at 1/2, 1/4 or 1/8 size, see ``draft_size``.
    """

    def __init__(
        self,
        resize: Any,
        image_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        draft: bool,
    ) -> None:
        super().__init__(mean, std)
        self.image_size = image_size
        self.draft = draft
        self.transform = transforms.Compose([resize, transforms.ToTensor(), self.normalize])

    def smallest_side(self, width: int, height: int) -> float:
        """Returns the shortest side, in pixels, of what is resized of an image of this size."""
        return min(width, height)

    def draft_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height that a JPEG of this size may be reduced to while it is decoded.

        Never so small that any part of it would have to be enlarged to S; the full size without ``draft``.
        """
        scale = min(1.0, self.image_size / self.smallest_side(width, height)) if self.draft else 1.0
        return int(width * scale), int(height * scale)


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(_Blip2ImageProcessor):
    """A random crop of ``min_scale`` to ``max_scale`` of the area, resized. Uses torch's random state."""

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
        draft: bool = False,
    ) -> None:
        if not 0 < min_scale <= max_scale <= 1:
            raise UserError(
                f"blip2_image_train: min_scale is {min_scale} and max_scale is {max_scale}; expected "
                "0 < min_scale <= max_scale <= 1."
            )
        self.scale = min_scale, max_scale
        self.crop = transforms.RandomResizedCrop(image_size, self.scale, interpolation=_BICUBIC)
        super().__init__(self.crop, image_size, mean, std, draft)

    def smallest_side(self, width: int, height: int) -> float:
        """That of the smallest and most oblong crop, or of the centre crop that is used if none fits."""
        return min(width, height, sqrt(self.scale[0] * self.crop.ratio[0] * width * height))


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(_Blip2ImageProcessor):
    """The whole image, resized to a square."""

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        draft: bool = False,
    ) -> None:
        super().__init__(transforms.Resize((image_size, image_size), _BICUBIC), image_size, mean, std, draft)

    @property
    def first_size(self) -> tuple[int, int] | None:
        """The width and height to which an image may be resized before (bicubic), with the same result.

        None in subclasses, which may begin with anything else.
        """
        return (self.image_size, self.image_size) if type(self) is Blip2ImageEvalProcessor else None


@registry.register_processor("blip_caption")
class BlipCaptionProcessor(_BuiltIn):
    """Lower case, punctuation replaced by spaces, single spaces, at most ``max_words`` words, ``prompt`` in front."""

    def __init__(self, prompt: str = "", max_words: int = 50) -> None:
        super().__init__()
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        """Cleans one caption."""
        return self.prompt + self.pre_caption(caption)

    def pre_caption(self, caption: str) -> str:
        """Cleans a caption without adding the prompt."""
        text = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return " ".join(text.split(" ")[: self.max_words])

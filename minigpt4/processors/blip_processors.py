"""The processors of BLIP-2 that MiniGPT-4 uses."""

import re
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from minigpt4.common.registry import registry

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _ImageProcessor:
    """PIL RGB image to float32 [3, S, S], normalised with ``mean`` and ``std`` per channel."""

    def __init__(
        self, resize: Any, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        self.transform = transforms.Compose(
            [resize, transforms.ToTensor(), transforms.Normalize(mean or MEAN, std or STD)]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Processes one image."""
        return self.transform(image)


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(_ImageProcessor):
    """A random crop of ``min_scale`` to ``max_scale`` of the area, resized bicubically. Uses torch's random state."""

    def __init__(self, image_size: int = 224, min_scale: float = 0.5, max_scale: float = 1.0, **stats: Any) -> None:
        scale, mode = (min_scale, max_scale), InterpolationMode.BICUBIC
        super().__init__(transforms.RandomResizedCrop(image_size, scale=scale, interpolation=mode), **stats)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "Blip2ImageTrainProcessor":
        """From ``image_size``, ``min_scale``, ``max_scale``, ``mean`` and ``std``, all optional."""
        return cls(**_arguments(cfg))


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(_ImageProcessor):
    """The whole picture, resized bicubically to a square."""

    def __init__(self, image_size: int = 224, **stats: Any) -> None:
        super().__init__(transforms.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC), **stats)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "Blip2ImageEvalProcessor":
        """From ``image_size``, ``mean`` and ``std``, all optional."""
        return cls(**_arguments(cfg))


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

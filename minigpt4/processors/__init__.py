"""Image and text processors, by registered name."""

from collections.abc import Mapping
from typing import Any

from minigpt4.common.registry import registry
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    BlipCaptionProcessor,
    BlipImageBaseProcessor,
)

__all__ = [
    "BaseProcessor",
    "Blip2ImageEvalProcessor",
    "Blip2ImageTrainProcessor",
    "BlipCaptionProcessor",
    "BlipImageBaseProcessor",
    "load_processor",
]


def load_processor(name: str, cfg: Mapping[str, Any] | None = None) -> BaseProcessor:
    """Builds the processor registered as ``name`` from a configuration section, by default with its own defaults."""
    return registry.get_processor_class(name).from_config(cfg)

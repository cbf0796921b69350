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
    "eval_image_processor",
    "load_processor",
]


def load_processor(name: str, cfg: Mapping[str, Any] | None = None) -> BaseProcessor:
    """Builds the processor registered as ``name`` from a configuration section, by default with its own defaults."""
    return registry.get_processor_class(name).from_config(cfg)


def eval_image_processor(cfg: Any) -> BaseProcessor:
    """The image processor for chat: ``vis_processor.eval`` of the first data set, else ``blip2_image_eval``.

    Args:
        cfg: the ``Config`` of the run; ``model.image_size`` is the size of the default processor.
    """
    dataset = next(iter((cfg.config.get("datasets") or {}).values()), None) or {}
    section = (dataset.get("vis_processor") or {}).get("eval") or {"image_size": cfg.model_cfg.image_size}
    return load_processor(section.get("name", "blip2_image_eval"), section)

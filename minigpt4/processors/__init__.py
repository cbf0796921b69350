"""Pictures to tensors and captions to clean text, by registered name."""

from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor, BlipCaptionProcessor

__all__ = ["Blip2ImageEvalProcessor", "Blip2ImageTrainProcessor", "BlipCaptionProcessor"]

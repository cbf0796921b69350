"""Builders by registered name: a section under ``datasets`` to its splits."""

from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.builders.image_text_pair_builder import (
    CCSBUAlignBuilder,
    CCSBUBuilder,
    ImageTextBuilder,
    LaionBuilder,
)

__all__ = ["BaseDatasetBuilder", "CCSBUAlignBuilder", "CCSBUBuilder", "ImageTextBuilder", "LaionBuilder"]

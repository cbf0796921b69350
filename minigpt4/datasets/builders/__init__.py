"""Builders by registered name: from a section under ``datasets`` to data sets by split."""

from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.builders.image_text_pair_builder import (
    CCSBUAlignBuilder,
    CCSBUBuilder,
    ImageTextBuilder,
    LaionBuilder,
)
from minigpt4.datasets.builders.instruction_builder import InstructionBuilder

__all__ = [
    "BaseDatasetBuilder",
    "CCSBUAlignBuilder",
    "CCSBUBuilder",
    "ImageTextBuilder",
    "InstructionBuilder",
    "LaionBuilder",
]

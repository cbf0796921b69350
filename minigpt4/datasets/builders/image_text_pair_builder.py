"""The data sets of MiniGPT-4's two stages, and one's own pictures."""

import logging
from typing import Any, ClassVar

from minigpt4.common.files import locate
from minigpt4.common.registry import registry
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs
from minigpt4.datasets.datasets.shard_urls import expand_shards


class ShardBuilder(BaseDatasetBuilder):
    """Shards of img2dataset; captions pass the text processor."""

    def build_split(self, split: str, storage: Any, key: str) -> ShardDataset:
        """A split from a brace pattern, a glob, a folder, a URL, or a list of these."""
        shards = expand_shards(storage, key)
        logging.info("%s/%s: %d shards.", self.name, split, len(shards))
        buffer = self.config["build_info"].get("shuffle_buffer", 1000)
        return ShardDataset(self.name, shards, self.vis_processor(split), self.text_processor(split), buffer)


@registry.register_builder("laion")
class LaionBuilder(ShardBuilder):
    """LAION shards of stage 1."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/laion/defaults.yaml"}


@registry.register_builder("cc_sbu")
class CCSBUBuilder(ShardBuilder):
    """Conceptual Captions and SBU shards of stage 1."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/defaults.yaml"}


class PairBuilder(BaseDatasetBuilder):
    """Listed pairs; captions are used as they are."""

    read = staticmethod(read_pairs)

    def build_split(self, split: str, storage: Any, key: str) -> PairDataset:
        """A split from a folder or file."""
        pairs = self.read(locate(storage, key), key)
        logging.info("%s/%s: %d pairs.", self.name, split, len(pairs))
        return PairDataset(self.name, pairs, self.vis_processor(split))


@registry.register_builder("cc_sbu_align")
class CCSBUAlignBuilder(PairBuilder):
    """The curated pairs of stage 2: filter_cap.json and image/."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/align.yaml"}
    read = staticmethod(read_align_folder)


@registry.register_builder("image_text")
class ImageTextBuilder(PairBuilder):
    """One's own pictures: a JSONL file, or a folder of images with .txt files."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/image_text/defaults.yaml"}

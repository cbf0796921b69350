"""The data sets of MiniGPT-4's two stages, and own pictures."""

import logging
from typing import Any, ClassVar

from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.registry import registry
from minigpt4.common.schema import SPLITS, BuildInfo, read_section
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs
from minigpt4.datasets.datasets.shard_urls import expand_shards


class StorageBuilder(BaseDatasetBuilder):
    """Builds every split whose storage is given: ``storage``, ``val_storage`` and ``test_storage`` of build_info."""

    def build(self) -> dict[str, Any]:
        """Returns the data sets by split; raises UserError if there is none, or no data at a storage."""
        self.build_processors()
        section = f"datasets.{self.name}.build_info"
        self.build_info = read_section(BuildInfo, self.config.get("build_info"), section, allow_unknown=True)
        storages = {split: getattr(self.build_info, key) for split, key in SPLITS.items()}
        if not storages["train"] and not storages["val"]:
            raise UserError(f"{section}.storage is not set; set it to the location of the data.")
        return {
            split: self.build_split(split, storage, f"{section}.{SPLITS[split]}")
            for split, storage in storages.items()
            if storage
        }

    def build_split(self, split: str, storage: Any, key: str) -> Any:
        """Builds the data set of one split; ``key`` names the storage in messages."""
        raise NotImplementedError


class ShardBuilder(StorageBuilder):
    """Shards of img2dataset; captions pass the text processor."""

    def build_split(self, split: str, storage: Any, key: str) -> ShardDataset:
        """A split from a brace pattern, a glob, a folder, a URL, or a list of these."""
        shards = expand_shards(storage, key)
        logging.info("%s/%s: %d shards.", self.name, split, len(shards))
        kind = "train" if split == "train" else "eval"
        processors = self.vis_processors[kind], self.text_processors[kind]
        return ShardDataset(self.name, shards, *processors, self.build_info.shuffle_buffer)


@registry.register_builder("laion")
class LaionBuilder(ShardBuilder):
    """LAION shards of stage 1."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/laion/defaults.yaml"}


@registry.register_builder("cc_sbu")
class CCSBUBuilder(ShardBuilder):
    """Conceptual Captions and SBU shards of stage 1."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/defaults.yaml"}


class PairBuilder(StorageBuilder):
    """Listed pairs; captions are used as they are."""

    read = staticmethod(read_pairs)

    def build_split(self, split: str, storage: Any, key: str) -> PairDataset:
        """A split from a folder or file."""
        pairs = self.read(locate(storage, key), key)
        logging.info("%s/%s: %d pairs.", self.name, split, len(pairs))
        return PairDataset(self.name, pairs, self.vis_processors["train" if split == "train" else "eval"])


@registry.register_builder("cc_sbu_align")
class CCSBUAlignBuilder(PairBuilder):
    """The curated pairs of stage 2: filter_cap.json and image/."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/align.yaml"}
    read = staticmethod(read_align_folder)


@registry.register_builder("image_text")
class ImageTextBuilder(PairBuilder):
    """Own pictures: a JSONL file, or a folder of images with .txt files."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/image_text/defaults.yaml"}

"""The data sets of MiniGPT-4's two stages, and the user's own images."""

import logging
from typing import Any, ClassVar

from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.registry import registry
from minigpt4.common.schema import SPLITS, BuildInfo, read_section
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.datasets.pairs import check_images, read_align_folder, read_pairs
from minigpt4.datasets.datasets.shard_urls import expand_shards


class StorageBuilder(BaseDatasetBuilder):
    """Builds every split whose storage is given: ``storage``, ``val_storage`` and ``test_storage`` of build_info."""

    def build(self) -> dict[str, Any]:
        """Returns the data sets by split; raises UserError if there is none, or no data at a storage."""
        self.build_processors()
        section, datasets = f"datasets.{self.name}.build_info", {}
        self.build_info = read_section(BuildInfo, self.config.get("build_info"), section, allow_unknown=True)
        if not self.build_info.storage and not self.build_info.val_storage:
            raise UserError(f"{section}.storage is not set; set it to the location of the data.")
        for split, key in SPLITS.items():
            if storage := getattr(self.build_info, key):
                kind = "train" if split == "train" else "eval"
                datasets[split] = self.build_split(storage, f"{section}.{key}", kind)
        return datasets

    def build_split(self, storage: Any, key: str, kind: str) -> Any:
        """Builds a data set with the processors of ``train`` or ``eval``; ``key`` names the storage in messages."""
        raise NotImplementedError


class ShardBuilder(StorageBuilder):
    """Shards of img2dataset from a brace pattern, a glob, a folder, a URL, or a list of these."""

    def build_split(self, storage: Any, key: str, kind: str) -> ShardDataset:
        """Builds a data set of shards; captions pass the text processor."""
        shards = expand_shards(storage, key)
        logging.info("%s: %d shards.", key, len(shards))
        processors = self.vis_processors[kind], self.text_processors[kind]
        info = self.build_info
        return ShardDataset(self.name, shards, *processors, info.shuffle_buffer, info.timeout, info.retries)


@registry.register_builder("laion")
class LaionBuilder(ShardBuilder):
    """LAION shards of stage 1."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/laion/defaults.yaml"}


@registry.register_builder("cc_sbu")
class CCSBUBuilder(ShardBuilder):
    """Conceptual Captions and SBU shards of stage 1."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/defaults.yaml"}


class PairBuilder(StorageBuilder):
    """Listed pairs from a folder or file, or a list of these."""

    read = staticmethod(read_pairs)

    def build_split(self, storage: Any, key: str, kind: str) -> PairDataset:
        """Builds a data set of pairs; captions are used as they are."""
        places = [storage] if isinstance(storage, str) else storage
        pairs = [pair for place in places for pair in self.read(locate(place, key), key)]
        check_images(pairs, key)
        logging.info("%s: %d pairs.", key, len(pairs))
        return PairDataset(self.name, pairs, self.vis_processors[kind])


@registry.register_builder("cc_sbu_align")
class CCSBUAlignBuilder(PairBuilder):
    """The curated pairs of stage 2: filter_cap.json and image/."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/align.yaml"}
    read = staticmethod(read_align_folder)


@registry.register_builder("image_text")
class ImageTextBuilder(PairBuilder):
    """The user's own images: a JSONL file, or a folder of images with .txt files."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/image_text/defaults.yaml"}

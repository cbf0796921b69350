"""The data sets of MiniGPT-4's two stages, and the user's own images."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.registry import registry
from minigpt4.common.schema import SPLITS, BuildInfo, read_section
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets import ConversationDataset, PairDataset, ShardDataset
from minigpt4.datasets.datasets.conversations import Dialogue, Pair
from minigpt4.datasets.datasets.instructions import check_boxes
from minigpt4.datasets.datasets.lists import shard_patterns
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

    read = staticmethod(read_align_folder)

    def build_split(self, storage: Any, key: str, kind: str) -> PairDataset | ConversationDataset:
        """Builds a data set of pairs, or of conversations where there is one; texts are used as they are."""
        places = [storage] if isinstance(storage, str) else storage
        rows = [row for place in places for row in self.read(locate(place, key), key)]
        check_images(rows, key)
        rows = check_boxes(rows, key, _texts_of) if self.has_boxes else rows
        logging.info("%s: %d rows.", key, len(rows))
        has_pairs_only = all(isinstance(row, Pair) for row in rows)
        return (PairDataset if has_pairs_only else ConversationDataset)(self.name, rows, self.vis_processors[kind])


def _texts_of(row: Pair | Dialogue) -> list[str]:
    texts = (row.instruction, row.caption) if isinstance(row, Pair) else [text for turn in row.turns for text in turn]
    return [text for text in texts if isinstance(text, str)]


@registry.register_builder("cc_sbu_align")
class CCSBUAlignBuilder(PairBuilder):
    """The curated pairs of stage 2: filter_cap.json and image/."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/cc_sbu/align.yaml"}


@registry.register_builder("image_text")
class ImageTextBuilder(PairBuilder):
    """The user's own images and conversations, in one of the forms that dataset/README_OWN_DATA.md lists."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/datasets/image_text/defaults.yaml"}

    def read(self, path: Path, key: str) -> list[Pair | Dialogue]:
        """Reads a file or folder; image paths are relative to ``build_info.image_root``."""
        root = self.build_info.image_root
        return read_pairs(path, key, root and locate(root, f"datasets.{self.name}.build_info.image_root"))

    def build_split(self, storage: Any, key: str, kind: str) -> PairDataset | ConversationDataset | ShardDataset:
        """Builds a data set of shards where the storage names shards, else of what it lists."""
        places = [storage] if isinstance(storage, str) else list(storage)
        shards = [shard_patterns(place, key) for place in places]
        if not any(shards):
            return super().build_split(storage, key, kind)
        if not all(shards):
            other = places[shards.index([])]
            raise UserError(f"{key} names shards and also '{other}'; use another data set for one of the two.")
        return ShardBuilder.build_split(self, [pattern for patterns in shards for pattern in patterns], key, kind)

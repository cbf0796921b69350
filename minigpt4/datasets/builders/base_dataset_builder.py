"""What every builder does: processors from their configuration, a data set a split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.schema import SPLITS


class BaseDatasetBuilder:
    """Builds the splits of one data set from its section.

    Subclasses give ``build_split``; keys of their own under the section are passed on unchecked.

    Args:
        cfg: the section under ``datasets``.
        name: its name, for messages.
    """

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {}

    def __init__(self, cfg: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.config = cfg or {}
        self.name = name

    @classmethod
    def default_config_path(cls, type: str = "default") -> Path | None:
        """The YAML file of a data set's defaults, or None where it has none."""
        path = cls.DATASET_CONFIG_DICT.get(type)
        return Path(__file__).parents[2] / path if path else None

    def build_datasets(self) -> dict[str, Any]:
        """Every split whose storage is given: ``train`` and, from val_storage and test_storage, ``val`` and ``test``.

        Raises:
            UserError: there is no data where the section says.
        """
        build_info = self.config.get("build_info") or {}
        if not build_info.get("storage") and not build_info.get("val_storage"):
            raise UserError(f"datasets.{self.name}.build_info.storage is not set; give it the place of the data.")
        return {
            split: self.build_split(split, build_info[key], f"datasets.{self.name}.build_info.{key}")
            for split, key in SPLITS.items()
            if build_info.get(key)
        }

    def build_split(self, split: str, storage: Any, key: str) -> Any:
        """Builds one split from its place; ``key`` names the place in messages."""
        raise NotImplementedError

    def vis_processor(self, split: str) -> Any:
        """The image processor of a split: ``train`` for training, ``eval`` (of the same size by default) for others."""
        sections = self.config.get("vis_processor") or {}
        train = sections.get("train") or {"name": "blip2_image_train"}
        evaluate = sections.get("eval") or {"name": "blip2_image_eval", "image_size": train.get("image_size", 224)}
        return _processor(train if split == "train" else evaluate)

    def text_processor(self, split: str) -> Any:
        """The caption processor of a split, the same for all where only ``train`` is given."""
        sections = self.config.get("text_processor") or {}
        train = sections.get("train") or {"name": "blip_caption"}
        return _processor(train if split == "train" else sections.get("eval") or train)


def _processor(section: Mapping[str, Any]) -> Any:
    return registry.get_processor_class(section["name"]).from_config(section)

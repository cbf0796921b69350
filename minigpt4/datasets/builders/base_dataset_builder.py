"""The base class of builders: processors and data sets by split, from a section under ``datasets``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.schema import LATER
from minigpt4.processors import BaseProcessor, load_processor


def load_dataset_config(cfg_path: str | Path) -> DictConfig:
    """The section of the first data set in a YAML file."""
    return next(iter(OmegaConf.load(cfg_path).datasets.values()))


def create_builder(name: str, section: Mapping[str, Any], arch: str) -> "BaseDatasetBuilder":
    """The builder of a section under ``datasets``, for a model of ``arch``.

    The reference's last commit, whose archs are ``LATER``, resizes images in training where the first one crops them;
    so do we, unless ``min_scale`` or ``max_scale`` asks for crops.
    """
    builder = registry.get_builder_class(section.get("builder") or name)(section)
    builder.name = name
    builder.has_boxes = arch == "minigpt_v2"
    processor = (section.get("vis_processor") or {}).get("train") or {}
    if arch in LATER and not processor.keys() & {"min_scale", "max_scale"}:
        builder.crops = False
    return builder


class BaseDatasetBuilder:
    """Builds the data sets of one section. Subclasses override ``build``, ``build_datasets`` or only the classes.

    A data set may be a torch ``Dataset`` or ``IterableDataset``, a webdataset ``DataPipeline``, or any object with
    ``__len__`` and ``__getitem__``. Its samples are dicts; its ``collater``, by default torch's ``default_collate``,
    makes batches of them.

    Args:
        cfg: the section, a YAML file that contains it, or None for the default YAML file.
        name: of the data set, for messages.

    Attributes:
        config: the section, keys of the user's own included.
        has_boxes: whether texts hold boxes, as those of MiniGPT-v2.
        crops: whether ``blip2_image_train`` crops images; else it resizes them as ``blip2_image_eval`` does.
        vis_processors, text_processors: by ``train`` and ``eval``; the identity until ``build_processors`` is called.
    """

    train_dataset_cls: ClassVar[Any] = None
    eval_dataset_cls: ClassVar[Any] = None
    crops, has_boxes = True, False
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {}  # type: path of a YAML file, relative to the package or absolute

    def __init__(self, cfg: Mapping[str, Any] | str | Path | None = None, name: str = "") -> None:
        path = self.default_config_path() if cfg is None else cfg
        if isinstance(path, str | Path):
            cfg = load_dataset_config(path)
        self.config = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg or {}))
        self.name = name
        self.data_type = self.config.get("data_type", "images")
        self.vis_processors: dict[str, Any] = {"train": BaseProcessor(), "eval": BaseProcessor()}
        self.text_processors = dict(self.vis_processors)

    @classmethod
    def default_config_path(cls, type: str = "default") -> Path | None:
        """The YAML file with the defaults of a data set, or None if it has none."""
        path = cls.DATASET_CONFIG_DICT.get(type)
        return Path(__file__).parents[2] / path if path else None

    def build_datasets(self) -> dict[str, Any]:
        """Downloads what is missing, on the main process only, and returns ``{split: data set}``."""
        dist_utils.run_on_main(self._download_data)
        return self.build()

    def build_processors(self) -> None:
        """Builds the processors of the section; those of ``eval`` follow from ``train`` where they are not given."""
        images, texts = (self.config.get(key) or {} for key in ("vis_processor", "text_processor"))
        size = {key: value for key, value in (images.get("train") or {}).items() if key == "image_size"}
        for split in ("train", "eval"):
            image, text = images.get(split) or size, texts.get(split) or texts.get("train") or {}
            name = image.get("name", f"blip2_image_{split}")
            name = "blip2_image_eval" if name == "blip2_image_train" and not self.crops else name
            self.vis_processors[split] = load_processor(name, image)
            self.text_processors[split] = load_processor(text.get("name", "blip_caption"), text)

    def _download_data(self) -> None:
        self._download_ann()
        self._download_vis()

    def _download_ann(self) -> None:
        """Downloads annotations; nothing here."""

    def _download_vis(self) -> None:
        """Downloads images; nothing here."""

    def build(self) -> dict[str, Any]:
        """Builds one data set per split of ``build_info.annotations``, with ``train_dataset_cls`` or eval_dataset_cls.

        The annotation files are ``annotations.SPLIT.storage``, the images are in ``build_info.DATA_TYPE.storage``.

        Raises:
            UserError: the section has no annotations; such builders override this method.
        """
        self.build_processors()
        build_info = self.config.get("build_info") or {}
        if not build_info.get("annotations"):
            key = f"datasets.{self.name}.build_info.annotations"
            advice = "set SPLIT.storage below it to annotation files. A builder of other data overrides build()."
            raise UserError(f"{key} is not set; {advice}")
        datasets, vis_root = {}, (build_info.get(self.data_type) or {}).get("storage")
        for split, info in build_info.annotations.items():
            kind = "train" if split == "train" else "eval"
            processors = {"vis_processor": self.vis_processors[kind], "text_processor": self.text_processors[kind]}
            files = [info.storage] if isinstance(info.storage, str) else list(info.storage)
            dataset_cls = self.train_dataset_cls if kind == "train" else self.eval_dataset_cls
            datasets[split] = dataset_cls(**processors, vis_root=vis_root, ann_paths=files)
        return datasets

"""The data sets of MiniGPT-v2 by their registered names."""

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.registry import registry
from minigpt4.common.schema import BuildInfo, read_section
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets import annotations
from minigpt4.datasets.datasets.annotations import Row
from minigpt4.datasets.datasets.instructions import (
    FORMATS,
    InstructionDataset,
    InstructionFormat,
    check_rows,
    find_images,
)

_DEFAULTS = {  # below configs/datasets
    "refcoco": "coco_bbox/refcoco.yaml",
    "refcocop": "coco_bbox/refcocop.yaml",
    "refcocog": "coco_bbox/refcocog.yaml",
    "invrefcoco": "coco_bbox/invrefcoco.yaml",
    "invrefcocop": "coco_bbox/invrefcocop.yaml",
    "invrefcocog": "coco_bbox/invrefcocog.yaml",
    "refvg": "vg/ref.yaml",
    "flickr_grounded_caption": "flickr/default.yaml",
    "flickr_CaptionToPhrase": "flickr/caption_to_phrase.yaml",
    "flickr_ObjectToPhrase": "flickr/object_to_phrase.yaml",
    "llava_conversation": "llava/conversation.yaml",
    "llava_detail": "llava/detail.yaml",
    "llava_reason": "llava/reason.yaml",
    "multitask_conversation": "multitask_conversation/default.yaml",
    "unnatural_instruction": "nlp/unnatural_instruction.yaml",
    "coco_caption": "coco/caption.yaml",
    "textcaps_caption": "textcaps/caption.yaml",
    "coco_vqa": "coco/defaults_vqa.yaml",
    "ok_vqa": "okvqa/defaults.yaml",
    "aok_vqa": "aokvqa/defaults.yaml",
    "gqa": "gqa/balanced_val.yaml",
    "ocrvqa": "ocrvqa/ocrvqa.yaml",
}


class InstructionBuilder(BaseDatasetBuilder):
    """Builds the split ``train`` from published annotation files; subclasses have a format each."""

    format: ClassVar[InstructionFormat]
    crops = False  # boxes refer to the whole image

    def build(self) -> dict[str, Any]:
        """Returns the data set; raises UserError where files are missing, of another data set, or unusable."""
        self.build_processors()
        section = f"datasets.{self.name}.build_info"
        info = read_section(BuildInfo, self.config.get("build_info"), section, allow_unknown=True)
        key, _ = _first(
            section, ann_path=info.ann_path, data_dir=info.data_dir, annotations=info.annotations.train.storage
        )
        rows = check_rows(self._read(info, section), key, self.format.has_boxes)
        if any(row.images for row in rows):
            places = {"image_path": info.image_path, "data_dir": info.data_dir, "images.storage": info.images.storage}
            key, folder = _first(section, **places)
            rows = find_images(rows, locate(folder, key), key)
        if not rows:
            raise UserError(f"{key}: there is nothing to train on; it has no entry of the split for training.")
        logging.info("%s: %d rows.", key, len(rows))
        processors = self.vis_processors["train"], self.text_processors["train"]
        return {"train": InstructionDataset(self.name, rows, self.format, *processors)}

    def _read(self, info: BuildInfo, section: str) -> Iterator[Row]:
        if info.data_dir:
            yield from self.format.read(locate(info.data_dir, f"{section}.data_dir"), f"{section}.data_dir")
        elif info.dataset:
            folder = locate(info.ann_path, f"{section}.ann_path")
            yield from self.format.read(folder, f"{section}.ann_path", info.dataset, info.splitBy or "unc")
        else:
            files = {"ann_path": info.ann_path, "annotations.train.storage": info.annotations.train.storage}
            key, storage = _first(section, **files)
            for place in [storage] if isinstance(storage, str) else storage:
                file = locate(place, key)
                if not file.is_file():
                    raise UserError(f"{key}: {file} is a folder; expected the file of the annotations.")
                yield from self.format.read(annotations.read_file(file, key), f"{key}: {file}")


def _first(section: str, **places: Any) -> tuple[str, Any]:
    """The key and the value of the first place that is set."""
    for name, place in places.items():
        if place:
            return f"{section}.{name}", place
    raise UserError(f"{section}.{next(iter(places))} is not set; set it to where the data are.")


for _name, _path in _DEFAULTS.items():
    _attributes = {"format": FORMATS[_name], "DATASET_CONFIG_DICT": {"default": f"configs/datasets/{_path}"}}
    registry.register_builder(_name)(type(f"{_name}_builder", (InstructionBuilder,), _attributes))

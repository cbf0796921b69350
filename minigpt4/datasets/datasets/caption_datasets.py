"""The reference's data sets of images and captions, for data sets that users define."""

from pathlib import Path
from typing import Any

from minigpt4.common.images import read_image
from minigpt4.datasets.datasets.base_dataset import BaseDataset


class CaptionDataset(BaseDataset):
    """Annotations with ``image_id`` and ``caption``; images are named as COCO's, with twelve digits.

    A sample has ``image`` (what the image processor returns), ``text_input`` and ``image_id``, which counts the
    different image ids from 0; ``img_ids`` maps them to their numbers.
    """

    FILE_NAME = "{:0>12}.jpg"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ids = dict.fromkeys(entry["image_id"] for entry in self.annotation)
        self.img_ids = {image_id: number for number, image_id in enumerate(ids)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads and processes one image and its caption; raises UserError if the image cannot be read."""
        image_id, caption = self.annotation[index]["image_id"], self.annotation[index]["caption"]
        image = read_image(Path(self.vis_root or "") / self.FILE_NAME.format(image_id))
        text = self.prepare_caption(caption)
        return {"image": self.vis_processor(image), "text_input": text, "image_id": self.img_ids[image_id]}

    def prepare_caption(self, caption: str) -> str:
        """Passes a caption through the text processor."""
        return self.text_processor(caption)

"""The reference's data set of stage 2, for data sets that users define; our own builder uses ``PairDataset``."""

from minigpt4.datasets.datasets.caption_datasets import CaptionDataset


class CCSBUAlignDataset(CaptionDataset):
    """Annotations with ``image_id`` and ``caption``; images are named ``ID.jpg``, captions are used as they are."""

    FILE_NAME = "{}.jpg"

    def prepare_caption(self, caption: str) -> str:
        """Returns the caption unchanged."""
        return caption

"""The reference's base class of map-style data sets, for data sets that users define."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import Dataset, default_collate

from minigpt4.common.utils import parse_json


class BaseDataset(Dataset):
    """Annotations of one or several JSON files, to be turned into samples by a subclass's ``__getitem__``.

    Args:
        vis_processor, text_processor: of images and of texts.
        vis_root: folder of the images.
        ann_paths: files of the form ``{"annotations": [{…}, …]}``; each entry gets its number as text, ``instance_id``.
    """

    def __init__(
        self, vis_processor: Any = None, text_processor: Any = None, vis_root: str | None = None, ann_paths: Any = ()
    ) -> None:
        self.vis_root = vis_root
        contents = [parse_json(Path(path).read_bytes(), str(path)) for path in ann_paths]
        self.annotation = [entry for content in contents for entry in content["annotations"]]
        for number, entry in enumerate(self.annotation):
            entry["instance_id"] = str(number)
        self.set_processors(vis_processor, text_processor)

    def __len__(self) -> int:
        return len(self.annotation)

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch: numbers and tensors stacked, texts in lists."""
        return default_collate(samples)

    def set_processors(self, vis_processor: Any, text_processor: Any) -> None:
        """Replaces both processors."""
        self.vis_processor, self.text_processor = vis_processor, text_processor


class ConcatDataset(TorchConcatDataset):
    """Several data sets one behind the other."""

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch of the keys that all of them have, by the first data set's collater."""
        shared = set.intersection(*map(set, samples))
        return self.datasets[0].collater([{key: sample[key] for key in sample if key in shared} for sample in samples])

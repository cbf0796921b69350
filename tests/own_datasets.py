"""Data sets as users write them, of each kind."""

import random

import numpy
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class Numbers(Dataset):
    """An own map-style data set; what it draws shows the random state of each sample."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        draws = random.random(), numpy.random.rand(), torch.rand(()).item()
        return {"index": index, "draws": torch.tensor(draws, dtype=torch.float64), "text_input": f"c{index}"}


class Listed:
    """The same without a base class, with a collater."""

    __len__, __getitem__ = Numbers.__len__, Numbers.__getitem__

    def __init__(self, size):
        self.size = size

    def collater(self, samples):
        return {"index": [sample["index"] for sample in samples], "worker": get_worker_info() is not None}


class Stream(IterableDataset):
    """An own iterable, divided over the workers."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        info = get_worker_info()
        for index in range(info.id if info else 0, self.size, info.num_workers if info else 1):
            yield {"index": index, "draw": random.random(), "text_input": f"c{index}"}

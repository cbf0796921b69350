"""The two kinds of data set: pairs that can be indexed, and shards that stream."""

from minigpt4.datasets.datasets.pairs import PairDataset
from minigpt4.datasets.datasets.shards import ShardDataset

__all__ = ["PairDataset", "ShardDataset"]

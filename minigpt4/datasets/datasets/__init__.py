"""The kinds of data set: pairs and conversations that can be indexed, and shards that stream."""

from minigpt4.datasets.datasets.conversations import ConversationDataset
from minigpt4.datasets.datasets.instructions import InstructionDataset
from minigpt4.datasets.datasets.pairs import PairDataset
from minigpt4.datasets.datasets.shards import ShardDataset

__all__ = ["ConversationDataset", "InstructionDataset", "PairDataset", "ShardDataset"]

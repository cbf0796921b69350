"""What all data sets share: which worker reads, how far it has read, one sample, and why a sample is skipped."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from minigpt4.common.errors import UserError, see
from minigpt4.common.images import ImageTooLarge, read_image

ImageProcessor = Callable[[Image.Image], Tensor]
TextProcessor = Callable[[str], str]
# image: float32 [3, S, S], or features: bfloat16 [Q, H]; text_input: str; instruction: str or None
Sample = dict[str, Any]

MAX_CAPTION = 100_000  # characters; the tokenizer would process all of them before truncation to max_txt_len
MAX_BAD_IN_A_ROW = 1000  # unusable samples in a row after which a data set is considered broken


class SkipSample(Exception):
    """A sample cannot be used; the message is the kind under which it is counted."""


@dataclass(frozen=True)
class WorkerInfo:
    """A loader worker: its number within its rank, and the rank; all order and augmentation follow from the seed."""

    seed: int
    rank: int = 0
    world_size: int = 1
    worker_id: int = 0
    num_workers: int = 1

    @property
    def index(self) -> int:
        """The worker's number among the ``count`` workers of all ranks."""
        return self.rank * self.num_workers + self.worker_id

    @property
    def count(self) -> int:
        """The number of workers of all ranks."""
        return self.world_size * self.num_workers


@dataclass(frozen=True)
class StreamPosition:
    """How far a worker has read its stream of shards.

    Args:
        num_samples: undecoded samples taken from the stream, unusable ones included.
        shard_sizes: samples in each shard drawn so far, except the one being read.
    """

    num_samples: int = 0
    shard_sizes: tuple[int, ...] = ()


def derive_seed(seed: int, *names: Any) -> int:
    """A seed for one purpose, the same in every process and run."""
    return zlib.crc32(repr((seed, *names)).encode())


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples to a batch: tensors stacked, [B, 3, S, S] or [B, Q, H], texts as lists of length B."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name in batch.keys() & {"image", "features"}:
        batch[name] = default_collate(batch[name])  # stacks into shared memory when called in a worker
    return batch


def decode_image(data: bytes, draft_size: Callable[[int, int], tuple[int, int]] | None = None) -> Image.Image:
    """Decodes an image file as ``read_image`` does; raises SkipSample if that is refused."""
    try:
        return read_image(data, draft_size=draft_size)
    except ImageTooLarge as error:
        raise SkipSample("image too large") from error
    except UserError as error:
        raise SkipSample("unreadable image") from error


def prepare_image(data: bytes, processor: ImageProcessor) -> Tensor:
    """Decodes an image and processes it to [3, S, S]; raises SkipSample if the bytes are no usable image."""
    return processor(decode_image(data, getattr(processor, "draft_size", None)))


def check_caption(caption: Any) -> str:
    """Returns a caption that is text; raises SkipSample for anything else."""
    if not isinstance(caption, str) or not caption.strip():
        raise SkipSample("no caption")
    if len(caption) > MAX_CAPTION:
        raise SkipSample("caption too long")
    return caption


def no_usable_sample(name: str, skipped: Counter, hint: str = "") -> UserError:
    """The error for a data set of which nothing can be used, with the kinds of what was skipped."""
    kinds = ", ".join(f"{count} × {kind}" for kind, count in skipped.items())
    return UserError(f"Data set {name} has no usable sample ({kinds}){hint}.{see('silent-data-failure')}")


def file_identity(path: Path | str) -> list[Any]:
    """Name, size and modification time of a file; the name alone if it is no local file."""
    try:
        status = Path(path).stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]

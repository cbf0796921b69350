"""What both kinds of data set share: the place of a reader, one sample, and why a sample is skipped."""

import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.common.utils import open_image

ImageProcessor = Callable[[Image.Image], Any]
TextProcessor = Callable[[str], str]
Sample = dict[str, Any]  # image: what prepare_image gives; text_input: str; instruction: str or None

MAX_CAPTION = 100_000  # characters; all but max_txt_len tokens are cut off, but only after all were made
MAX_BAD_IN_A_ROW = 1000  # a source without a single usable sample among so many is a mistake, not bad luck


class SkipSample(Exception):
    """A sample cannot be used; the message is the kind that is counted."""


@dataclass
class Place:
    """Which part of the data one loader worker reads, from where on, and what it had to skip there.

    Part ``index`` of ``count``: workers of all ranks together. A run is repeated by the same seed on the same parts.
    """

    seed: int
    rank: int = 0
    world_size: int = 1
    turn: int = 0  # of this worker in each round of batches
    num_workers: int = 1
    batch_size: int = 1
    first_sample: int = 0  # samples that this source gave to all ranks together before
    first_batch: int = 0  # batches of this epoch that this source gave to each rank before
    draw: int | str = 0  # names a fresh draw of shards: the epoch, or where within it other ranks went on
    positions: dict[int, Any] = field(default_factory=dict)  # of streams to go on with, by worker
    position: Any = None  # of this worker's stream, behind the sample that came last
    skipped: Counter = field(default_factory=Counter)

    @property
    def worker(self) -> int:
        """Number of this worker's stream; rounds begin with the one whose turn it was when the run was left."""
        return (self.turn + self.first_batch) % self.num_workers

    @property
    def index(self) -> int:
        """Number of this part."""
        return self.rank * self.num_workers + self.worker

    @property
    def count(self) -> int:
        """Number of parts."""
        return self.world_size * self.num_workers

    def sub_seed(self, *names: Any) -> int:
        """A seed of its own for whatever the names say, the same in every process and run."""
        return zlib.crc32(repr((self.seed, *names)).encode())


def prepare_image(data: bytes, processor: ImageProcessor) -> Any:
    """Decodes an image and processes it to [3, S, S].

    Raises:
        SkipSample: the bytes are no image that can be used.
    """
    return processor(decode_image(data, getattr(processor, "draft_size", None)))


def decode_image(data: bytes, draft_size: Callable[[int, int], tuple[int, int]] | None = None) -> Image.Image:
    """Bytes of a JPEG, PNG or WebP to an RGB image; raises SkipSample for whatever is not one.

    JPEGs may come out at 1/2, 1/4 or 1/8 of their width and height, not below what ``draft_size`` gives for them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = open_image(data)
            if draft_size and (size := draft_size(*image.size)) != image.size:
                image.draft("RGB", size)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy what is RGB
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipSample("image too large") from error
    except Exception as error:  # each of Pillow's decoders has exceptions of its own
        raise SkipSample("unreadable image") from error


def file_identity(path: Path | str) -> list[Any]:
    """Name, size and time of a file, as far as it is one here."""
    try:
        status = Path(path).stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def check_caption(caption: Any) -> str:
    """Returns a caption that is text; raises SkipSample for anything else."""
    if not isinstance(caption, str) or not caption.strip():
        raise SkipSample("no caption")
    if len(caption) > MAX_CAPTION:
        raise SkipSample("caption too long")
    return caption

"""Conversations about any number of images, as LLaVA, ShareGPT, LLaMA-Factory and OpenAI write them."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from minigpt4.common.images import read_plain_file
from minigpt4.datasets.datasets.sample import ImageProcessor, Sample, SkipSample, collate, file_identity, prepare_image


@dataclass(frozen=True)
class DataUrl:
    """An image within a text, ``data:image/…;base64,…``."""

    url: str

    def read(self) -> bytes:
        """The bytes of the image; raises SkipSample if they are not in base64."""
        try:
            return base64.b64decode(self.url.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise SkipSample("unreadable image") from error

    def identity(self) -> list[Any]:
        """What its features depend on."""
        return [self.url]


ImageSource = Any  # a Path, or an object with read() and identity() as DataUrl has them


@dataclass(frozen=True)
class Pair:
    """One image, its caption, and the question that the caption answers, if any."""

    image: ImageSource
    caption: str
    instruction: str | None = None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The image."""
        return (self.image,)


@dataclass(frozen=True)
class Dialogue:
    """(question, answer)s; ``<ImageHere>`` in questions marks the positions of the images, in order."""

    images: tuple[ImageSource, ...]
    turns: tuple[tuple[str, str], ...]
    system: str = ""


def read_source(image: ImageSource) -> bytes:
    """The bytes of an image; raises SkipSample if its file is missing or cannot be read."""
    if not isinstance(image, Path):
        return image.read()
    try:
        return read_plain_file(image)
    except FileNotFoundError as error:
        raise SkipSample("missing image file") from error
    except OSError as error:
        raise SkipSample("unreadable image") from error


def source_identity(image: ImageSource) -> list[Any]:
    """What the features of an image depend on: a file's name, size and time."""
    return file_identity(image) if isinstance(image, Path) else image.identity()


def collate_conversations(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples to a batch: all images in one tensor [n, 3, S, S], their number per sample, texts as lists."""
    images = [image for sample in samples for image in sample["image"]]
    batch = collate([{key: value for key, value in sample.items() if key != "image"} for sample in samples])
    num_images = [len(sample["image"]) for sample in samples]
    return batch | {"image": default_collate(images) if images else samples[0]["image"], "num_images": num_images}


@dataclass(eq=False)
class ConversationDataset(Dataset):
    """Conversations and pairs.

    Args:
        name: of the data set, for messages.
        rows: all of them.
        vis_processor: from an RGB image to float32 [3, S, S].

    A sample has ``image`` [n, 3, S, S], ``text_input`` (its answers, for reports), ``instruction`` and
    ``conversation``, which is None for a pair.
    """

    name: str
    rows: list[Pair | Dialogue]
    vis_processor: ImageProcessor
    collater = staticmethod(collate_conversations)
    drop_last = False  # every row is used in each pass

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Reads and processes one row; raises SkipSample if an image is missing or damaged."""
        row = self.rows[index]
        images = [prepare_image(read_source(image), self.vis_processor) for image in row.images]
        blank = Image.new("RGB", (32, 32))
        pixels = torch.stack(images) if images else self.vis_processor(blank)[None][:0]
        if isinstance(row, Pair):
            return {"image": pixels, "text_input": row.caption, "instruction": row.instruction, "conversation": None}
        conversation = {"turns": list(row.turns), "system": row.system}
        answers = "\n".join(answer for _, answer in row.turns)
        return {"image": pixels, "text_input": answers, "instruction": None, "conversation": conversation}

    @property
    def first_file(self) -> str:
        """The first image, for messages."""
        return next((str(image) for row in self.rows for image in row.images), "none")

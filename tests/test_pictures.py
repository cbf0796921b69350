"""Images of data sets: decoding, reduced decoding of large JPEGs, processors that a user defines."""

import io

import numpy
import pytest
import torch
from PIL import Image

from minigpt4.datasets.datasets import PairDataset
from minigpt4.datasets.datasets.pairs import Pair
from minigpt4.datasets.datasets.sample import SkipSample, decode_image
from minigpt4.datasets.loader import TrainLoader, eval_batches
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor

KINDS = [Blip2ImageTrainProcessor, Blip2ImageEvalProcessor]


def jpeg(width, height):
    y, x = numpy.mgrid[:height, :width] / max(width, height)
    buffer = io.BytesIO()
    Image.fromarray((numpy.stack([x, y, x * y], 2) * 255).astype(numpy.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path):
    made = []
    for number in range(10):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(jpeg(20 + number, 31 - number))
        made.append(Pair(file, f"c{number}"))
    return made


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_what_the_processor_returns(pairs, num_workers):
    processor = Blip2ImageEvalProcessor(16)
    settings = {"batch_size": 3, "num_workers": num_workers, "seed": 1}
    batches = list(eval_batches("x", PairDataset("x", pairs, processor), **settings))
    images = torch.cat([batch["image"] for batch in batches])
    order = [int(text[1:]) for batch in batches for text in batch["text_input"]]
    assert images.dtype == torch.float32 and sorted(order) == list(range(10))
    for number, image in zip(order, images, strict=True):
        assert torch.equal(image, processor(decode_image(pairs[number].image.read_bytes())))


def test_a_function_may_be_the_processor(pairs):
    dataset = PairDataset("x", pairs, lambda image: torch.full((3, 2, 2), float(image.width)))
    (batch,) = TrainLoader({"x": dataset}, {}, batch_size=4, iters_per_epoch=1, num_workers=0, seed=0).iter_epoch(0)
    assert batch["image"].shape == (4, 3, 2, 2)


def test_images_without_caption_are_not_decoded(pairs, monkeypatch):
    decoded = []
    monkeypatch.setattr("minigpt4.datasets.datasets.pairs.prepare_image", lambda data, _: decoded.append(data))
    pairs[1:] = [Pair(pair.image, " ") for pair in pairs[1:]]
    dataset = PairDataset("x", pairs, None)
    assert dataset[0]["text_input"] == "c0"
    for index in range(1, len(pairs)):
        with pytest.raises(SkipSample, match="no caption"):
            dataset[index]
    assert len(decoded) == 1


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_draft_decodes_at_a_reduced_scale(kind, scale):
    processor, plain = kind(32, draft=True), kind(32)
    share = 1.0 if kind is Blip2ImageEvalProcessor else (0.5 * 3 / 4) ** 0.5  # of the side, for the smallest crop
    side = next(side for side in range(32 * scale, 1000) if side * share >= 32 * scale)
    data = jpeg(side, side)
    image = decode_image(data, processor.draft_size)
    assert image.width == -(-side // scale) and decode_image(data, plain.draft_size).width == side
    if kind is Blip2ImageEvalProcessor:  # random crops are drawn in pixels of the decoded image, so they differ
        assert (processor(image) - plain(decode_image(data))).abs().max() < 0.25  # of a range of about 4


@pytest.mark.parametrize("size", [(900, 40), (40, 900), (1200, 100), (100, 1200), (640, 257), (130, 70), (70, 31)])
@pytest.mark.parametrize("kind", KINDS)
def test_draft_never_makes_a_part_of_an_oblong_image_smaller_than_the_result(kind, size):
    processor = kind(32, draft=True)
    image = decode_image(jpeg(*size), processor.draft_size)
    if kind is Blip2ImageEvalProcessor:
        smallest = [min(image.size)]
        is_reducible = min(size) >= 64
    else:
        crops = (processor.crop.get_params(image, processor.crop.scale, processor.crop.ratio) for _ in range(300))
        smallest = [min(height, width) for _, _, height, width in crops]
        is_reducible = min(*size, (0.5 * 3 / 4 * size[0] * size[1]) ** 0.5) >= 64
    assert min(smallest) >= 32 or image.size == size
    assert (image.size != size) == is_reducible

"""Pictures as bytes: whatever the device does with them gives the numbers that Pillow and torchvision give."""

import io
import json
import random
import sys

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms

from benchmarks import data_pipeline
from minigpt4.common import device as devices
from minigpt4.datasets.datasets import PairDataset
from minigpt4.datasets.datasets.pairs import Pair
from minigpt4.datasets.datasets.sample import Place, decode_image
from minigpt4.datasets.loader import TrainLoader, validation_batches
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor, pictures
from minigpt4.processors.blip_processors import MEAN, STD
from minigpt4.processors.pictures import Pictures, device_resizes, resizes_alike

DEVICES = sorted({"cpu", devices.best()})
BICUBIC = transforms.InterpolationMode.BICUBIC


def noise(width, height, seed=0, levels=256):
    values = numpy.random.default_rng(seed).integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
    return Image.fromarray(values.astype(numpy.uint8))


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def as_torchvision(resize):
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def sides(side):
    """Sizes between half and twice a side, its own and the extremes among them."""
    rng = random.Random(side)
    extremes = ((side, side), (side, 2 * side), (-(-side // 2), side), (2 * side, side + 1), (side - 1, side))
    drawn = ((rng.randint(side // 2 + 1, 2 * side), rng.randint(side // 2 + 1, 2 * side)) for _ in range(12))
    return [*extremes, *drawn]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [8, 33, 224])
@pytest.mark.parametrize("levels", [2, 256], ids=["black and white", "all values"])
def test_the_device_resizes_as_pillow_does(device, side, levels):
    processor = Blip2ImageEvalProcessor(side)
    images = [noise(w, h, seed, levels) for seed, (w, h) in enumerate(sides(side))]
    assert all(processor.crop(image) is image for image in images)  # nothing is resized before
    packed = processor.pack(images, resizes_later=True)
    on_device = packed.on(device).cpu()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(packed.on(device).cpu(), on_device)
    resized = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    assert torch.equal(on_device, torch.stack(list(map(as_torchvision(lambda image: image), resized))))


@pytest.mark.parametrize("device", DEVICES)
def test_normalising_gives_torchvisions_numbers(device):
    every = numpy.arange(256, dtype=numpy.uint8).repeat(3).reshape(16, 16, 3)
    image = Image.fromarray(every)
    found = Pictures.pack([image], 16, MEAN, STD).on(device).cpu()
    assert torch.equal(found[0], as_torchvision(lambda image: image)(image))
    assert found.dtype == torch.float32 and found.is_contiguous()


@pytest.mark.parametrize("size", [(300, 260), (90, 700), (700, 90), (224, 224), (50, 40), (1000, 900)], ids=str)
@pytest.mark.parametrize("resizes_later", [False, True])
def test_same_draws_and_pixels_as_torchvision(size, resizes_later):
    image, processor = noise(*size), Blip2ImageTrainProcessor(224)
    plain = as_torchvision(transforms.RandomResizedCrop(224, (0.5, 1.0), interpolation=BICUBIC))
    for seed in range(5):
        torch.manual_seed(seed)
        expected, state = plain(image), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(processor.pack([processor.crop(image)], resizes_later).on("cpu")[0], expected)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(seed)
        assert torch.equal(processor(image), expected)


def test_accelerators_resize_unless_their_numbers_are_others(monkeypatch, caplog):
    cpu, accelerator = torch.device("cpu"), torch.device("meta")
    assert device_resizes(True, cpu) and not device_resizes(None, cpu) and not device_resizes(False, accelerator)
    assert not caplog.text
    assert not device_resizes(None, accelerator) and "fails" in caplog.text  # nothing can be read on meta

    def in_bfloat16(*args):
        return [part.bfloat16().float() for part in exact(*args)]

    exact = pictures._filters
    monkeypatch.setattr(pictures, "_filters", in_bfloat16)
    assert not device_resizes(True, cpu) and "gives other pixels than Pillow" in caplog.text


def test_large_and_oblong_pictures_are_resized_at_once():
    processor = Blip2ImageEvalProcessor(16)
    for size in ((33, 20), (7, 20), (4000, 10)):
        assert processor.crop(noise(*size)).size == (16, 16)
    assert resizes_alike(32, 8, 16) and not resizes_alike(33, 8, 16) and not resizes_alike(16, 7, 16)


@pytest.fixture
def pairs(tmp_path):
    made = []
    for number in range(10):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(jpeg(noise(20 + number, 31 - number, number)))
        made.append(Pair(file, f"c{number}"))
    return made


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_bytes_and_equal_wherever_they_are_resized(pairs, num_workers):
    def batches(resizes_later):
        dataset = PairDataset("x", pairs, Blip2ImageTrainProcessor(16))
        settings = {"batch_size": 3, "num_workers": num_workers, "seed": 1, "resizes_later": resizes_later}
        trained = list(TrainLoader({"x": dataset}, {}, iters_per_epoch=4, **settings).epoch(0))
        return trained + list(validation_batches("x", PairDataset("x", pairs, Blip2ImageEvalProcessor(16)), **settings))

    for early, late in zip(batches(False), batches(True), strict=True):
        assert early["image"].data.dtype == torch.uint8 and len(early["image"]) == len(early["text_input"])
        assert early["image"].data.numel() == len(early["image"]) * 3 * 16 * 16
        assert {(16, 16)} == set(early["image"].sizes) != set(late["image"].sizes)
        assert torch.equal(early["image"].on("cpu"), late["image"].on("cpu"))


def test_a_processor_of_ones_own_gives_tensors(pairs):
    dataset = PairDataset("x", pairs, lambda image: torch.full((3, 2, 2), float(image.width)))
    (batch,) = TrainLoader({"x": dataset}, {}, batch_size=4, iters_per_epoch=1, num_workers=0, seed=0).epoch(0)
    assert batch["image"].shape == (4, 3, 2, 2)


def test_what_has_no_caption_is_not_decoded(pairs, monkeypatch):
    decoded = []
    monkeypatch.setattr("minigpt4.datasets.datasets.pairs.prepare_image", lambda data, _: decoded.append(data))
    pairs[1:] = [Pair(pair.image, " ") for pair in pairs[1:]]
    assert len(list(PairDataset("x", pairs, None).once(Place(seed=0)))) == len(decoded) == 1


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [Blip2ImageTrainProcessor, Blip2ImageEvalProcessor])
def test_draft_decodes_at_a_reduced_scale_where_no_crop_is_enlarged(kind, scale):
    processor, plain = kind(32, draft=True), kind(32)
    side = next(side for side in range(32 * scale, 1000) if processor.smallest_side(side, side) >= 32 * scale)
    y, x = numpy.mgrid[:side, :side] / side
    data = jpeg(Image.fromarray((numpy.stack([x, y, x * y], 2) * 255).astype(numpy.uint8)), quality=95)
    image = decode_image(data, processor.draft_size)
    assert image.width == -(-side // scale) and decode_image(data, plain.draft_size).width == side
    if kind is Blip2ImageEvalProcessor:  # random rectangles are drawn in pixels, which are others now
        assert (processor(image) - plain(decode_image(data))).abs().max() < 0.25  # of a range of about 4


def test_local_seed_draws_what_it_always_drew():
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3), random.random()
    with devices.local_seed(7):
        assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_the_benchmark_tells_its_numbers(monkeypatch, capsys):
    options = "--compare plain --side 24 --batch-size 4 --batches 1 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["data_pipeline", *options.split()])
    monkeypatch.setattr(data_pipeline, "BUFFER", 10)
    data_pipeline.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["times plain"]) == {"device resizes", "worker resizes", "plain"}
    assert min(result["samples/s a worker"].values()) > 0 and result["times plain"]["plain"] == 1

"""What one loader worker gives a second, beside the plain way, in turns in one process, as a table and as JSON.

python -m benchmarks.data_pipeline --compare plain                        # drawn pictures of 256 pixels
python -m benchmarks.data_pipeline --compare plain --shards 'DATA/{00000..00003}.tar'

The plain way: webdataset's reader, a full decode with Pillow, RandomResizedCrop, ToTensor and Normalize of torchvision,
torch's own collate of float32 [B, 3, 224, 224]. All ways read the same shards, hold as large a buffer of undecoded
samples and run one worker; while one is measured, the others' workers wait with full queues.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torchvision import transforms
from webdataset.tariterators import group_by_keys, tarfile_samples

from minigpt4.common import device as devices
from minigpt4.common.device import local_seed
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.tar_files import expand_shards, read_files
from minigpt4.datasets.loader import TrainLoader
from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor
from minigpt4.processors.blip_processors import MEAN, STD

IMAGE_SIZE, BUFFER, IN_QUEUE = 224, 200, 2  # batches that a worker of torch's loader keeps ready
RATIOS = ((1, 1), (4, 3), (3, 2), (3, 4), (16, 9))
CROP = transforms.RandomResizedCrop(IMAGE_SIZE, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
NORMALIZE = transforms.Normalize(MEAN, STD)


def draw(rng: numpy.random.Generator, width: int, height: int) -> Image.Image:
    """A picture of noise whose spectrum falls so that its JPEG takes about as many bits a pixel as a photograph's."""
    frequency = numpy.hypot(numpy.fft.fftfreq(height)[:, None] * height, numpy.fft.rfftfreq(width)[None] * width)
    noise = numpy.fft.rfft2(rng.standard_normal((3, height, width))) / numpy.maximum(frequency, 1) ** 1.5
    planes = numpy.fft.irfft2(noise, s=(height, width))
    planes = planes[:1] + 0.1 * planes  # colours differ less than brightness
    planes = 128 + 55 * planes / planes.std()
    return Image.fromarray(planes.clip(0, 255).astype(numpy.uint8).transpose(1, 2, 0))


def write_shards(folder: Path, side: int, num_shards: int = 2, samples: int = 300) -> list[str]:
    """Shards as img2dataset writes them by default: squares with white borders, JPEGs of quality 95, JSON and text."""
    rng, paths = numpy.random.default_rng(0), []
    for shard in range(num_shards):
        paths.append(str(folder / f"{shard:05}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(samples):
                w, h = RATIOS[number % len(RATIOS)]
                size = side * w // max(w, h), side * h // max(w, h)
                square, buffer = Image.new("RGB", (side, side), "white"), io.BytesIO()
                square.paste(draw(rng, *size), ((side - size[0]) // 2, (side - size[1]) // 2))
                square.save(buffer, "JPEG", quality=95)
                caption, key = f"a picture of many colours, number {number}", f"{shard:05}{number:04}"
                record = {"caption": caption, "key": key, "width": side, "height": side, "status": "success"}
                files = {"jpg": buffer.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}
                for kind, data in files.items():
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


class PlainShards(IterableDataset):
    """The plain way to samples, for ever."""

    def __init__(self, shards: list[str]) -> None:
        self.shards = shards
        self.caption = BlipCaptionProcessor()
        self.transform = transforms.Compose([CROP, transforms.ToTensor(), NORMALIZE])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng, buffer = random.Random(0), []
        while True:
            for raw in tarfile_samples([{"url": rng.choice(self.shards)}]):
                buffer.append(raw)
                if len(buffer) >= BUFFER:
                    i = rng.randrange(len(buffer))
                    buffer[i], buffer[-1] = buffer[-1], buffer[i]
                    raw = buffer.pop()
                    image = Image.open(io.BytesIO(raw["jpg"])).convert("RGB")
                    text = self.caption(json.loads(raw["json"])["caption"])
                    yield {"image": self.transform(image), "text_input": text}


def ways(shards: list[str], batch_size: int, names: list[str], draft: bool) -> dict[str, Callable[[], Iterator[Any]]]:
    """What starts endless batches, by the name of the way."""

    def ours(resizes_later: bool) -> Iterator[dict[str, Any]]:
        processor = Blip2ImageTrainProcessor(IMAGE_SIZE, draft=draft)
        dataset = ShardDataset("bench", shards, processor, BlipCaptionProcessor(), BUFFER)
        settings = {"batch_size": batch_size, "iters_per_epoch": 10**5, "num_workers": 1, "seed": 0}
        return TrainLoader({"bench": dataset}, {}, **settings, **pinned, resizes_later=resizes_later).epoch(0)

    pinned = {"pin_memory": devices.pins_memory(devices.pick())}
    found = {"device resizes": lambda: ours(True), "worker resizes": lambda: ours(False)}
    found["plain"] = lambda: iter(DataLoader(PlainShards(shards), batch_size, num_workers=1, **pinned))
    return {name: found[name] for name in names}


class Worker:
    """A way's loader with its one worker, which rests with a full queue while no batch is taken."""

    def __init__(self, start: Callable[[], Iterator[dict[str, Any]]], batch_size: int) -> None:
        others = set(multiprocessing.active_children())
        self.batches, self.batch_size = start(), batch_size
        next(self.batches)
        (self.process,) = set(multiprocessing.active_children()) - others
        self.rest()

    def cpu_seconds(self) -> float:
        """What the worker has computed so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rest(self) -> None:
        """Waits until the queue is full again."""
        before = -1.0
        while before != (before := self.cpu_seconds()):
            time.sleep(0.3)

    def measure(self, num_batches: int) -> tuple[float, float]:
        """Samples a second of a busy worker: by the clock, and by its own processor time from rest to rest."""
        begin_cpu = self.cpu_seconds()
        for _ in range(IN_QUEUE + 1):
            next(self.batches)
        begin = time.perf_counter()
        for _ in range(num_batches):
            next(self.batches)
        elapsed = time.perf_counter() - begin
        self.rest()
        made = self.batch_size * (num_batches + IN_QUEUE + 1)
        return self.batch_size * num_batches / elapsed, made / max(self.cpu_seconds() - begin_cpu, 1e-9)


def on_device(batch: dict[str, Any], device: torch.device) -> Tensor:
    """The model's pixels of a batch of any way."""
    image = batch["image"]
    pixels = image.to(device) if isinstance(image, Tensor) else image.on(device)
    devices.synchronize(device)
    return pixels


def steps(shards: list[str], batch_size: int, repeats: int) -> dict[str, float]:
    """Microseconds a sample takes in each step, in one process, medians: of the plain way, and what replaces them."""
    raws = [raw for shard in shards for raw in tarfile_samples([{"url": shard}])][: max(batch_size, 64)]
    images = [Image.open(io.BytesIO(raw["jpg"])).convert("RGB") for raw in raws]
    processor = Blip2ImageTrainProcessor(IMAGE_SIZE)
    crops = [processor.crop(image) for image in images]
    resized = [CROP(image) for image in images]
    tensors = [transforms.functional.to_tensor(image) for image in resized]

    def fail(error: Exception) -> bool:
        raise error

    def seeded() -> None:
        with local_seed(1):
            pass

    num_read = sum(1 for _ in tarfile_samples([{"url": shards[0]}]))
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "read, plain": (lambda: list(tarfile_samples([{"url": shards[0]}])), num_read),
        "read": (lambda: list(group_by_keys(read_files(shards[:1], fail))), num_read),
        "decode, plain": (lambda: [Image.open(io.BytesIO(raw["jpg"])).convert("RGB") for raw in raws], len(raws)),
        "decode": (lambda: [Image.open(io.BytesIO(raw["jpg"])).load() for raw in raws], len(raws)),
        "seed": (lambda: [seeded() for _ in raws], len(raws)),
        "crop and resize": (lambda: [CROP(image) for image in images], len(raws)),
        "crop": (lambda: [processor.crop(image) for image in images], len(raws)),
        "ToTensor, plain": (lambda: [transforms.functional.to_tensor(image) for image in resized], len(raws)),
        "Normalize, plain": (lambda: [NORMALIZE(tensor) for tensor in tensors], len(raws)),
        "collate, plain": (lambda: default_collate(tensors[:batch_size]), batch_size),
        "pack, worker resizes": (lambda: processor.pack(crops[:batch_size]), batch_size),
        "pack, device resizes": (lambda: processor.pack(crops[:batch_size], True), batch_size),
    }
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, (step, count) in found.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e6 * (time.perf_counter() - begin) / count)
    return {name: round(statistics.median(values)) for name, values in times.items()}


def main() -> None:
    """Prints the tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="real ones, as build_info.storage takes them")
    parser.add_argument("--side", type=int, default=256, help="side of the drawn pictures")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="measured a repeat")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--draft", action="store_true", help="ours decodes large JPEGs at a reduced scale")
    parser.add_argument("--compare", choices=["plain"], help="measure the plain way beside ours")
    parser.add_argument("--json", type=Path, help="where the line of JSON goes, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = devices.pick()
    with tempfile.TemporaryDirectory() as folder:
        shards = expand_shards(args.shards, "--shards") if args.shards else write_shards(Path(folder), args.side)
        names = ["device resizes", "worker resizes"] + ["plain"] * (args.compare is not None)
        starts = ways(shards, args.batch_size, names, args.draft)
        workers = {name: Worker(start, args.batch_size) for name, start in starts.items()}
        rates, cpu_rates, moves = ({name: [] for name in names} for _ in range(3))
        for repeat in range(args.repeats + 1):
            for name, worker in workers.items():
                found = worker.measure(args.batches)
                batch = next(worker.batches)
                begin = time.perf_counter()
                on_device(batch, device)
                moved = 1000 * (time.perf_counter() - begin)
                worker.rest()
                if repeat:  # the first is a warm-up
                    for numbers, number in ((rates, found[0]), (cpu_rates, found[1]), (moves, moved)):
                        numbers[name].append(number)
        result: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, device {device}",
            "versions": {
                **{"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__},
                "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
            },
            **{
                "batch": args.batch_size,
                "image_size": IMAGE_SIZE,
                "shards": args.shards or f"drawn, {args.side} px",
                "draft": args.draft,
            },
            "samples/s a worker": {name: round(statistics.median(values), 1) for name, values in rates.items()},
            "samples/s of its processor time": {n: round(statistics.median(v), 1) for n, v in cpu_rates.items()},
            "spread": {name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()},
            "to the device, ms a batch": {name: round(statistics.median(v), 2) for name, v in moves.items()},
            "steps, us a sample": steps(shards, args.batch_size, args.repeats),
        }
    if args.compare:
        for key, numbers in (("times plain", rates), ("times plain, processor time", cpu_rates)):
            plain = numbers[args.compare]
            result[key] = {
                name: round(statistics.median(a / b for a, b in zip(numbers[name], plain, strict=True)), 2)
                for name in names
            }
    print(f"{result['machine']}; {result['versions']}; batches of {args.batch_size}, medians of {args.repeats}\n")
    columns = {
        **{"samples/s a worker": "samples/s a worker", "from, to": "spread", "times plain": "times plain"},
        "samples/s of processor time": "samples/s of its processor time",
        "times plain ": "times plain, processor time",
        "ms a batch on the device": "to the device, ms a batch",
    }
    print(f"| way | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in names:
        print(f"| {name} | {' | '.join(str(result.get(key, {}).get(name, '')) for key in columns.values())} |")
    print("\n| step | us a sample |\n|---|---|")
    for name, value in result["steps, us a sample"].items():
        print(f"| {name} | {value} |")
    line = json.dumps(result)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

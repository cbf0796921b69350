"""Samples per second of one loader worker, compared with a plain pipeline, as a table and as a line of JSON.

python -m benchmarks.data_pipeline --compare plain                        # generated images of 256 pixels
python -m benchmarks.data_pipeline --compare plain --shards 'DATA/{00000..00003}.tar'

The plain pipeline: webdataset's reader, decoding with Pillow, RandomResizedCrop, ToTensor and Normalize of torchvision,
torch's collate to float32 [B, 3, 224, 224]. Both read the same shards, hold the same number of undecoded samples in the
shuffle buffer and run one worker each, in turns within one process; a worker that is not measured is idle, its queue
being full.
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
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torchvision import transforms
from webdataset.tariterators import tarfile_samples

from minigpt4.common import device as devices
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.shard_urls import expand_shards
from minigpt4.datasets.loader import TrainLoader
from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor
from minigpt4.processors.blip_processors import MEAN, STD

IMAGE_SIZE, BUFFER = 224, 200
PREFETCHED = 2  # batches that a worker of torch's loader keeps ready
RATIOS = ((1, 1), (4, 3), (3, 2), (3, 4), (16, 9))
CROP = transforms.RandomResizedCrop(IMAGE_SIZE, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
NORMALIZE = transforms.Normalize(MEAN, STD)


def make_image(rng: numpy.random.Generator, width: int, height: int) -> Image.Image:
    """Noise with a falling spectrum, whose JPEG takes about as many bits per pixel as a photograph's."""
    frequency = numpy.hypot(numpy.fft.fftfreq(height)[:, None] * height, numpy.fft.rfftfreq(width)[None] * width)
    noise = numpy.fft.rfft2(rng.standard_normal((3, height, width))) / numpy.maximum(frequency, 1) ** 1.5
    planes = numpy.fft.irfft2(noise, s=(height, width))
    planes = planes[:1] + 0.1 * planes  # colours differ less than brightness
    planes = 128 + 55 * planes / planes.std()
    return Image.fromarray(planes.clip(0, 255).astype(numpy.uint8).transpose(1, 2, 0))


def write_shards(folder: Path, side: int, num_shards: int = 2, samples: int = 300) -> list[str]:
    """Writes shards like img2dataset's defaults: squares with white borders, JPEGs of quality 95, JSON and text."""
    rng, paths = numpy.random.default_rng(0), []
    for shard in range(num_shards):
        paths.append(str(folder / f"{shard:05}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(samples):
                w, h = RATIOS[number % len(RATIOS)]
                size = side * w // max(w, h), side * h // max(w, h)
                square, buffer = Image.new("RGB", (side, side), "white"), io.BytesIO()
                square.paste(make_image(rng, *size), ((side - size[0]) // 2, (side - size[1]) // 2))
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
    """Samples of the plain pipeline, endlessly."""

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


def pipelines(shards: list[str], batch_size: int, draft: bool) -> dict[str, Callable[[], Iterator[Any]]]:
    """Functions that start endless batches, by the name of the pipeline."""
    pin_memory = devices.has_own_memory(devices.pick())

    def ours() -> Iterator[dict[str, Any]]:
        processor = Blip2ImageTrainProcessor(IMAGE_SIZE, draft=draft)
        dataset = ShardDataset("bench", shards, processor, BlipCaptionProcessor(), BUFFER)
        settings = {"batch_size": batch_size, "iters_per_epoch": 10**5, "num_workers": 1, "seed": 0}
        return TrainLoader({"bench": dataset}, {}, **settings, pin_memory=pin_memory).iter_epoch(0)

    def plain() -> Iterator[dict[str, Any]]:
        return iter(DataLoader(PlainShards(shards), batch_size, num_workers=1, pin_memory=pin_memory))

    return {"ours": ours, "plain": plain}


class Worker:
    """A pipeline's loader with its one worker process, which is idle while its queue is full."""

    def __init__(self, start: Callable[[], Iterator[dict[str, Any]]], batch_size: int) -> None:
        others = set(multiprocessing.active_children())
        self.batches, self.batch_size = start(), batch_size
        next(self.batches)
        (self.process,) = set(multiprocessing.active_children()) - others
        self.wait_until_idle()

    def cpu_seconds(self) -> float:
        """Returns the processor time of the worker so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_idle(self) -> None:
        """Waits until the queue is full."""
        before = -1.0
        while before != (before := self.cpu_seconds()):
            time.sleep(0.3)

    def measure(self, num_batches: int) -> tuple[float, float]:
        """Returns samples per second of a busy worker: of wall time, and of its processor time from idle to idle."""
        begin_cpu = self.cpu_seconds()
        for _ in range(PREFETCHED + 1):
            next(self.batches)
        begin = time.perf_counter()
        for _ in range(num_batches):
            next(self.batches)
        elapsed = time.perf_counter() - begin
        self.wait_until_idle()
        made = self.batch_size * (num_batches + PREFETCHED + 1)
        return self.batch_size * num_batches / elapsed, made / max(self.cpu_seconds() - begin_cpu, 1e-9)


def time_steps(shards: list[str], batch_size: int, repeats: int) -> dict[str, float]:
    """Returns the median microseconds per sample of each step, in one process."""
    raws = [raw for shard in shards for raw in tarfile_samples([{"url": shard}])][: max(batch_size, 64)]
    images = [Image.open(io.BytesIO(raw["jpg"])).convert("RGB") for raw in raws]
    resized = [CROP(image) for image in images]
    tensors = [transforms.functional.to_tensor(image) for image in resized]
    num_read = sum(1 for _ in tarfile_samples([{"url": shards[0]}]))
    steps: dict[str, tuple[Callable[[], Any], int]] = {
        "read": (lambda: list(tarfile_samples([{"url": shards[0]}])), num_read),
        "decode": (lambda: [Image.open(io.BytesIO(raw["jpg"])).convert("RGB") for raw in raws], len(raws)),
        "crop and resize": (lambda: [CROP(image) for image in images], len(raws)),
        "ToTensor": (lambda: [transforms.functional.to_tensor(image) for image in resized], len(raws)),
        "Normalize": (lambda: [NORMALIZE(tensor) for tensor in tensors], len(raws)),
        "collate": (lambda: default_collate(tensors[:batch_size]), batch_size),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, (step, count) in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e6 * (time.perf_counter() - begin) / count)
    return {name: round(statistics.median(values)) for name, values in times.items()}


def measure(shards: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Runs the pipelines in turns; the first repeat is a warm-up."""
    names = ["ours"] + ["plain"] * (args.compare is not None)
    starts = pipelines(shards, args.batch_size, args.draft)
    workers = {name: Worker(starts[name], args.batch_size) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    cpu_rates: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(args.repeats + 1):
        for name, worker in workers.items():
            rate, cpu_rate = worker.measure(args.batches)
            if repeat:
                rates[name].append(rate)
                cpu_rates[name].append(cpu_rate)
    result = {
        "samples/s a worker": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "samples/s of its processor time": {n: round(statistics.median(v), 1) for n, v in cpu_rates.items()},
        "spread": {name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()},
    }
    if args.compare:
        for key, numbers in (("times plain", rates), ("times plain, processor time", cpu_rates)):
            ratios = {name: zip(numbers[name], numbers["plain"], strict=True) for name in names}
            result[key] = {name: round(statistics.median(a / b for a, b in pairs), 2) for name, pairs in ratios.items()}
    return result


def print_tables(result: dict[str, Any]) -> None:
    """Prints the figures as Markdown."""
    columns = {
        **{"samples/s a worker": "samples/s a worker", "from, to": "spread", "times plain": "times plain"},
        "samples/s of processor time": "samples/s of its processor time",
        "times plain ": "times plain, processor time",
    }
    print(f"| pipeline | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in result["samples/s a worker"]:
        print(f"| {name} | {' | '.join(str(result.get(key, {}).get(name, '')) for key in columns.values())} |")
    print("\n| step | us a sample |\n|---|---|")
    for name, value in result["steps, us a sample"].items():
        print(f"| {name} | {value} |")


def main() -> None:
    """Prints the tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="existing shards, as for build_info.storage")
    parser.add_argument("--side", type=int, default=256, help="side of the generated images in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="measured per repeat")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--draft", action="store_true", help="ours decodes large JPEGs at a reduced scale")
    parser.add_argument("--compare", choices=["plain"], help="also measure the plain pipeline")
    parser.add_argument("--json", type=Path, help="file that the line of JSON is written to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = expand_shards(args.shards, "--shards") if args.shards else write_shards(Path(folder), args.side)
        result: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                **{"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__},
                "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
            },
            **{"batch": args.batch_size, "image_size": IMAGE_SIZE, "draft": args.draft},
            "shards": args.shards or f"generated, {args.side} px",
            **measure(shards, args),
            "steps, us a sample": time_steps(shards, args.batch_size, args.repeats),
        }
    print(f"{result['machine']}; {result['versions']}; batches of {args.batch_size}, medians of {args.repeats}\n")
    print_tables(result)
    line = json.dumps(result)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

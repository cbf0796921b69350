"""Samples drawn from every source: what can be read, what they hold, and a sheet of what the model receives."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from minigpt4.common.device import local_seed
from minigpt4.common.errors import see
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.sample import SkipSample
from minigpt4.doctor.files import ModelFiles
from minigpt4.doctor.findings import ERROR, OK, WARNING, Finding, collect

NUM_SHARDS = 3  # opened of a source
_ANCHOR = "silent-data-failure"


@dataclass
class SampleStats:
    """What was drawn from one split of a source."""

    name: str
    description: str  # size of the source
    num_asked: int = 0
    captions: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)  # [3, S, S], as the model gets them
    skipped: Counter = field(default_factory=Counter)
    num_samples: float = 0.0  # of the source, estimated where it is shards


def draw(cfg: Any, num_samples: int = 16) -> tuple[list[SampleStats], list[Finding]]:
    """Draws from every source and split of a configuration; sources that are refused come back as findings."""
    drawn, findings = [], []

    def source(name: str, section: Any) -> list[Finding]:
        builder = registry.get_builder_class(name)(section)
        builder.name = name
        for split, dataset in builder.build_datasets().items():
            with local_seed(0):  # random crops, too, are the same each time
                if hasattr(dataset, "pairs"):
                    drawn.append(_draw_pairs(f"{name}/{split}", dataset, num_samples))
                elif hasattr(dataset, "shards"):
                    drawn.append(_draw_shards(f"{name}/{split}", dataset, num_samples))
        return []

    for name, section in (cfg.config.get("datasets") or {}).items():
        findings += collect(f"datasets.{name}", source, name, section)
    return drawn, findings


def _draw_pairs(name: str, dataset: Any, num_samples: int) -> SampleStats:
    drawn = SampleStats(name, f"{len(dataset):,} pairs", num_samples=len(dataset))
    for index in random.Random(0).sample(range(len(dataset)), min(num_samples, len(dataset))):
        _add(drawn, dataset.__getitem__, index)
    return drawn


def _draw_shards(name: str, dataset: Any, num_samples: int) -> SampleStats:
    local = [shard for shard in dataset.shards if Path(shard).is_file()]
    remote = f", {len(dataset.shards) - len(local):,} of them not local" * (len(local) < len(dataset.shards))
    drawn = SampleStats(name, f"{len(dataset.shards):,} shards{remote}")
    shards = random.Random(0).sample(local, min(NUM_SHARDS, len(local)))
    for i, shard in enumerate(shards):
        share = num_samples // len(shards) + (i < num_samples % len(shards))
        raws = list(itertools.islice(dataset.read([shard], drawn.skipped), share))
        drawn.num_asked += share if not raws else 0  # a shard that gives nothing counts as all that was asked of it
        for raw in raws:
            _add(drawn, dataset.process, raw)
        if drawn.images and not drawn.num_samples:
            # A file of a tar has a header of 512 bytes and is filled up to a multiple of that.
            files = [value for raw in raws for value in raw.values() if isinstance(value, bytes)]
            sample_bytes = sum(512 + -(-len(value) // 512) * 512 for value in files) / len(raws)
            drawn.num_samples = sum(Path(shard).stat().st_size for shard in local) / sample_bytes
    return drawn


def _add(drawn: SampleStats, read: Callable[[Any], Any], source: Any) -> None:
    drawn.num_asked += 1
    try:
        sample = read(source)
    except SkipSample as skip:
        drawn.skipped[str(skip)] += 1
        return
    drawn.captions.append(sample["text_input"])
    drawn.images.append(sample["image"])


def check_samples(drawn: SampleStats, files: ModelFiles) -> Finding:
    """Judges a source by the samples that were drawn from it."""
    check, num_good = f"datasets.{drawn.name}", len(drawn.captions)
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(drawn.skipped.items()))
    bad = 1 - num_good / drawn.num_asked if drawn.num_asked else 0.0
    numbers = {"drawn": drawn.num_asked, "unreadable": bad, "kinds": dict(drawn.skipped)}
    evidence = f"{drawn.description}; {drawn.num_asked} drawn, {bad:.0%} unusable" + (f" ({kinds})" if kinds else "")
    remedy = "Download or copy what is missing again; the run counts and skips such samples." + see(_ANCHOR)
    if not drawn.num_asked:
        return Finding(check, WARNING, f"{drawn.description}; none is local, so none was drawn", "Check one by hand.")
    if not num_good:
        return Finding(check, ERROR, evidence, remedy, numbers)
    evidence += f"; images of {drawn.images[0].shape[-1]} pixels; captions such as '{_cut(drawn.captions[0])}'"
    if bad >= 0.5:
        return Finding(check, ERROR, evidence, remedy, numbers)
    if suspicion := _suspicion(drawn, files):
        return Finding(check, WARNING, f"{evidence}; {suspicion[0]}", suspicion[1] + see(_ANCHOR), numbers)
    return Finding(check, WARNING if bad else OK, evidence, remedy if bad else "", numbers)


def _suspicion(drawn: SampleStats, files: ModelFiles) -> tuple[str, str] | None:
    """What can be read but looks wrong, and its remedy."""
    num = len(drawn.captions)
    if num >= 4 and len(set(drawn.captions)) <= num / 2:
        message = f"{len(set(drawn.captions))} different captions among {num}: '{_cut(drawn.captions[0])}' is repeated"
        return message, "Check the captions: are they those of the images?"
    if flat := sum(image.flatten(1).std(1).max().item() < 0.02 for image in drawn.images):
        return f"{flat} of {num} images are of a single colour", "Look at the sheet; remove such images."
    if num >= 4 and len({tuple(image.flatten()[::97].tolist()) for image in drawn.images}) <= num / 2:
        return "many images are one and the same", "Look at the sheet: are they placeholders of a failed download?"
    if files.model is not None:
        max_txt_len, end_sym = files.cfg.max_txt_len, files.cfg.end_sym
        lengths = [len(files.model.tokenize(text + end_sym)) for text in drawn.captions]
        cut = sum(length > max_txt_len for length in lengths) / num
        if cut > 0.1:
            message = f"{cut:.0%} of the captions are longer than max_txt_len {max_txt_len} and lose their end symbol"
            return message, f"Set model.max_txt_len: {max(lengths)} if memory allows."
    return None


def _cut(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def sheet(drawn: Sequence[SampleStats], path: Path, columns: int = 8, side: int = 160) -> Path | None:
    """Writes a contact sheet of images as the model receives them, with captions; None without images."""
    cells = [(part.name, *pair) for part in drawn for pair in zip(part.images, part.captions, strict=True)]
    if not cells:
        return None
    rows, text_height = -(-len(cells) // columns), 48
    page = Image.new("RGB", (columns * side, rows * (side + text_height)), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, image, caption) in enumerate(cells):
        left, top = i % columns * side, i // columns * (side + text_height)
        pixels = to_pil_image((image - image.min()) / (image.max() - image.min()).clamp(min=1e-6))  # full contrast
        page.paste(pixels.resize((side - 4, side - 4)), (left + 2, top + 2))
        lines = [name, *(_cut(caption, 72)[start : start + 24] for start in (0, 24, 48))]
        pen.multiline_text((left + 3, top + side), "\n".join(filter(None, lines)), "black", spacing=0, font_size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, compress_level=1)
    return path

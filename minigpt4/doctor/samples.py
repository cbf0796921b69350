"""Samples drawn from every source: what can be read, what they hold, and a sheet of what the model receives."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from minigpt4.common.device import local_seed
from minigpt4.common.errors import see
from minigpt4.datasets.builders.base_dataset_builder import create_builder
from minigpt4.datasets.datasets.sample import SkipSample
from minigpt4.doctor.files import ModelFiles
from minigpt4.doctor.findings import ERROR, OK, WARNING, Finding, collect, refused
from minigpt4.models.text_rows import IGNORE_INDEX

NUM_SHARDS = 3  # opened of a source
COLUMNS, SIDE, TEXT_HEIGHT = 8, 160, 48  # of the contact sheet, in pixels but the first
_ANCHOR = "silent-data-failure"


def answer_of(sample: Mapping[str, Any]) -> str:
    """What is to be learned of a sample; of a conversation, all answers."""
    return next(sample[name] for name in ("text_input", "answer", "conv_a") if name in sample)


@dataclass
class SampleStats:
    """What was drawn from one split of a source."""

    name: str
    description: str  # size of the source
    num_samples: float = 0.0  # of the source, estimated where it is shards
    num_drawn: int = 0
    texts: list[dict[str, Any]] = field(default_factory=list)  # the samples without their images
    images: list[tuple[Tensor, str]] = field(default_factory=list)  # [3, S, S], as the model gets them, with the text
    skipped: Counter = field(default_factory=Counter)
    dataset: Any = None

    def add(self, read: Callable[[Any], Any], source: Any) -> None:
        """Reads a sample and keeps it, or counts why it is unusable."""
        self.num_drawn += 1
        try:
            sample = read(source)
        except SkipSample as skip:
            self.skipped[str(skip)] += 1
            return
        self.texts.append({name: value for name, value in sample.items() if name != "image"})
        if (image := sample.get("image")) is not None:
            self.images += [(one, self.captions[-1]) for one in (image if image.ndim == 4 else image[None])]

    @property
    def captions(self) -> list[str]:
        """The texts that are to be learned, one for each sample."""
        return [answer_of(text) for text in self.texts]

    @property
    def conversations(self) -> list[dict[str, Any]]:
        """The conversations among the samples."""
        return [text["conversation"] for text in self.texts if text.get("conversation")]


def draw(cfg: Any, num_samples: int = 16) -> tuple[list[SampleStats], list[Finding]]:
    """Draws from every source and split of a configuration; sources that are refused come back as findings."""
    drawn, findings = [], []

    def source(name: str, section: Any) -> list[Finding]:
        builder = create_builder(name, section, cfg.model_cfg.get("arch", ""))
        for split, dataset in builder.build_datasets().items():
            with local_seed(0):  # random crops, too, are the same each time
                if hasattr(dataset, "pairs") or hasattr(dataset, "rows"):
                    drawn.append(_draw_pairs(f"{name}/{split}", dataset, num_samples))
                elif hasattr(dataset, "shards"):
                    drawn.append(_draw_shards(f"{name}/{split}", dataset, num_samples))
        return []

    for name, section in (cfg.config.get("datasets") or {}).items():
        findings += collect(f"datasets.{name}", source, name, section)
    return drawn, findings


def _draw_pairs(name: str, dataset: Any, num_samples: int) -> SampleStats:
    drawn = SampleStats(
        name, f"{len(dataset):,} {'pairs' if hasattr(dataset, 'pairs') else 'rows'}", len(dataset), dataset=dataset
    )
    for index in random.Random(0).sample(range(len(dataset)), min(num_samples, len(dataset))):
        drawn.add(dataset.__getitem__, index)
    return drawn


def _draw_shards(name: str, dataset: Any, num_samples: int) -> SampleStats:
    local = [shard for shard in dataset.shards if Path(shard).is_file()]
    drawn = SampleStats(name, f"{len(dataset.shards):,} shards, {len(local):,} of them local", dataset=dataset)
    shards = random.Random(0).sample(local, min(NUM_SHARDS, len(local)))
    for i, shard in enumerate(shards):
        share = num_samples // len(shards) + (i < num_samples % len(shards))
        raws = list(itertools.islice(dataset.read([shard], drawn.skipped), share))
        drawn.num_drawn += share if not raws else 0  # a shard that gives nothing counts as all that was asked of it
        for raw in raws:
            drawn.add(dataset.process, raw)
        if drawn.images and not drawn.num_samples:  # a file of a tar has a header of 512 bytes and some padding
            files = [value for raw in raws for value in raw.values() if isinstance(value, bytes)]
            sample_bytes = sum(768 + len(value) for value in files) / len(raws)
            drawn.num_samples = sum(Path(shard).stat().st_size for shard in local) / sample_bytes
    return drawn


def check_samples(drawn: SampleStats, files: ModelFiles) -> Finding:
    """Judges a source by the samples that were drawn from it."""
    check, num_good = f"datasets.{drawn.name}", len(drawn.captions)
    if not drawn.num_drawn:
        return Finding(check, WARNING, f"{drawn.description}; none was drawn", "Check one by hand.")
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(drawn.skipped.items()))
    bad = 1 - num_good / drawn.num_drawn
    numbers = {"drawn": drawn.num_drawn, "unreadable": bad, "kinds": dict(drawn.skipped)}
    evidence = f"{drawn.description}; {drawn.num_drawn} drawn, {bad:.0%} unusable" + (f" ({kinds})" if kinds else "")
    if num_good:
        evidence += f"; {_describe_images(drawn)}; captions such as '{_cut(drawn.captions[0])}'"
    if num_good and files.model is not None:
        evidence += f"; {marked_row(max(drawn.texts, key=lambda text: len(answer_of(text))), files.model)}"
    verdict, remedy = OK, ""
    if not num_good and hasattr(drawn.dataset, "no_usable_sample"):  # the message of the run itself
        refusal = refused(check, drawn.dataset.no_usable_sample(drawn.skipped))
        verdict, evidence, remedy = refusal.verdict, f"{evidence}; {refusal.evidence}", refusal.remedy
    elif bad:
        verdict = ERROR if bad >= 0.5 else WARNING
        remedy = "Download or copy what is missing again; the run counts and skips such samples." + see(_ANCHOR)
    if verdict != ERROR and (suspicion := _suspicion(drawn, files)):
        verdict, evidence, remedy = WARNING, f"{evidence}; {suspicion[0]}", suspicion[1] + see(_ANCHOR)
    return Finding(check, verdict, evidence, remedy, numbers)


def _suspicion(drawn: SampleStats, files: ModelFiles) -> tuple[str, str] | None:
    """What can be read but looks wrong, and its remedy."""
    num, num_different = len(drawn.captions), len(set(drawn.captions))
    is_captions = not any("instruction_input" in text for text in drawn.texts)  # many questions have one answer
    if is_captions and num >= 4 and num_different <= num / 2:
        message = f"{num_different} different captions among {num}: '{_cut(drawn.captions[0])}' is repeated"
        return message, "Check the captions: are they those of the images?"
    if flat := sum(image.flatten(1).std(1).max().item() < 0.02 for image, _ in drawn.images):
        return f"{flat} of {len(drawn.images)} images are of a single colour", "Look at the sheet; remove such images."
    if (
        len(drawn.images) >= 4
        and len({tuple(image.flatten()[::97].tolist()) for image, _ in drawn.images}) <= len(drawn.images) / 2
    ):
        return "many images are one and the same", "Look at the sheet: are they placeholders of a failed download?"
    if files.model is not None:
        limit, end_sym = files.cfg.max_txt_len, files.cfg.end_sym
        others = [text for text in drawn.texts if not (text.get("conversation") or "conv_a" in text)]
        lengths = [len(files.model.tokenize(answer_of(text) + end_sym)) for text in others]
        if (share := sum(length > limit for length in lengths) / num) > 0.1:
            message = f"{share:.0%} of the captions are longer than max_txt_len {limit} and lose their end symbol"
            return message, f"Set model.max_txt_len: {max(lengths)} if memory allows."
        stop = files.model.template.stop_string if drawn.conversations else ""
        ends = [(stop if text.get("conversation") else end_sym).strip() for text in drawn.texts]
        if found := [end for end, text in zip(ends, drawn.captions, strict=True) if end and end in text]:
            message = f"{len(found)} of {num} texts contain '{found[0]}', at which answers end"
            return message, "Remove it from the texts (headings of Markdown begin with #), or set another end."
        rows = [files.model.tokenize_conversation(**conversation) for conversation in drawn.conversations]
        if (share := sum(row.is_truncated for row in rows) / num) > 0.1:
            message = f"{share:.0%} of the conversations are longer than {files.model.max_context_len} tokens"
            return f"{message} and lose their last turns", "Raise model.max_context_len if the LM and memory allow it."
    return None


def marked_row(text: dict[str, Any], model: Any) -> str:
    """The training row of a sample as text, with its targets between ⟦ and ⟧."""
    row = model.training_rows({name: [value] for name, value in text.items()})[0]
    parts: list[str] = []
    pairs = zip(row.ids, row.labels, strict=True)
    for (is_image, is_target), run in itertools.groupby(pairs, lambda pair: (pair[0] < 0, pair[1] != IGNORE_INDEX)):
        ids = [token for token, _ in run]
        content = f"⟨{len(ids)} image positions⟩" if is_image else _cut(model.llama_tokenizer.decode(ids), 200)
        parts.append(f"⟦{content}⟧" if is_target else content)
    num_targets = sum(label != IGNORE_INDEX for label in row.labels)
    return f"a row of {len(row.ids)} tokens, {num_targets} of them targets (in ⟦⟧): {_cut(' '.join(parts), 800)}"


def _describe_images(drawn: SampleStats) -> str:
    return f"images of {drawn.images[0][0].shape[-1]} pixels" if drawn.images else "no images"


def _cut(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def sheet(drawn: Sequence[SampleStats], path: Path) -> list[Finding]:
    """Writes a contact sheet of images as the model receives them, with captions; nothing without images."""
    cells = [(part.name, *pair) for part in drawn for pair in part.images]
    if not cells:
        return []
    page = Image.new("RGB", (COLUMNS * SIDE, -(-len(cells) // COLUMNS) * (SIDE + TEXT_HEIGHT)), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, image, caption) in enumerate(cells):
        left, top = i % COLUMNS * SIDE, i // COLUMNS * (SIDE + TEXT_HEIGHT)
        pixels = to_pil_image((image - image.min()) / (image.max() - image.min()).clamp(min=1e-6))  # full contrast
        page.paste(pixels.resize((SIDE - 4, SIDE - 4)), (left + 2, top + 2))
        lines = [name, *(_cut(caption, 72)[start : start + 24] for start in (0, 24, 48))]
        pen.multiline_text((left + 3, top + SIDE), "\n".join(filter(None, lines)), "black", spacing=0, font_size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, compress_level=1)
    return [Finding("contact sheet", OK, f"{path}: {len(cells)} samples as the model receives them")]

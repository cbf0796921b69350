"""Scenes of one to three objects on a 3x3 grid: drawing, rendering, captions, parsing of answers, data sets."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

SIZES = ("small", "large")
COLOURS = {
    "red": (215, 35, 35), "green": (35, 160, 50), "blue": (35, 65, 220), "yellow": (240, 220, 40),
    "purple": (150, 40, 170), "cyan": (50, 215, 225), "white": (250, 250, 250), "black": (12, 12, 12),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
FILLER = "nothing"
MAX_OBJECTS = 3
IMAGE_SIZE = 64
HELD_OUT_PERCENT = 8
NUMBERS = ("no", "one", "two", "three")

_CANVAS = 256  # drawn large and scaled down, which smooths the edges
_EXTENTS = {"square": (0.88,) * 4, "triangle": (1, 1, 1, 0.8), "diamond": (0.7, 1, 0.7, 1)}  # of the box, in radii
Box = tuple[float, float, float, float]  # left, top, right, bottom
_ANSWER = re.compile(
    rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:is )?(?:at|in) the "
    rf"({'|'.join(sorted(PLACES, key=len, reverse=True))})(?![\w-])"
)


@dataclass(frozen=True, order=True)
class Thing:
    """One object; every field is a single word."""

    place: str
    size: str
    colour: str
    shape: str

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Size, colour, shape, place."""
        return self.size, self.colour, self.shape, self.place

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to three objects in distinct places, in raster order of their places."""

    things: tuple[Thing, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether this scene is kept out of all training; decided by its content alone."""
        digest = hashlib.sha256(repr([t.words for t in self.things]).encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT

    @property
    def words(self) -> list[str]:
        """The 12 canonical words: four for each object, fillers for absent ones."""
        words = [word for thing in self.things for word in thing.words]
        return words + [FILLER] * (4 * MAX_OBJECTS - len(words))


def draw_scene(rng: Random, held_out: bool = False) -> Scene:
    """Draws a scene, from the held-out scenes or from all others."""
    while True:
        places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, MAX_OBJECTS)))
        scene = Scene(tuple(
            Thing(PLACES[p], rng.choice(SIZES), rng.choice(list(COLOURS)), rng.choice(SHAPES)) for p in places
        ))  # fmt: skip
        if scene.is_held_out == held_out:
            return scene


def render(scene: Scene, rng: Random) -> Image.Image:
    """Renders an image [IMAGE_SIZE, IMAGE_SIZE] RGB; background, jitter and tint come from ``rng``."""
    return render_with_boxes(scene, rng, IMAGE_SIZE)[0]


def render_with_boxes(scene: Scene, rng: Random, size: int) -> tuple[Image.Image, list[Box]]:
    """Renders an image [size, size] RGB, and returns the box of each object in it, in pixels."""
    grey = rng.randint(112, 148)
    image = Image.new("RGB", (_CANVAS, _CANVAS), tuple(grey + rng.randint(-9, 9) for _ in range(3)))
    pen, cell, boxes = ImageDraw.Draw(image), _CANVAS / 3, []
    for thing in scene.things:
        row, column = divmod(PLACES.index(thing.place), 3)
        radius = (36 if thing.size == "large" else 20) + rng.uniform(-2, 2)
        slack = (cell / 2 - radius) * 0.6
        x = (column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (row + 0.5) * cell + rng.uniform(-slack, slack)
        colour = tuple(min(255, max(0, value + rng.randint(-8, 8))) for value in COLOURS[thing.colour])
        _draw_shape(pen, thing.shape, x, y, radius, colour)
        left, top, right, bottom = (radius * factor for factor in _EXTENTS.get(thing.shape, (1, 1, 1, 1)))
        boxes.append(tuple(value * size / _CANVAS for value in (x - left, y - top, x + right, y + bottom)))
    return image.resize((size, size), Image.Resampling.BOX), boxes


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.42 * r))
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)], fill=colour)
    else:  # cross
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)


def jpeg(image: Image.Image) -> bytes:
    """The image as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def caption(scene: Scene) -> str:
    """The short text of stage 1, unchanged by the caption processor."""
    return " and ".join(f"{thing} at the {thing.place}" for thing in scene.things)


def description(scene: Scene) -> str:
    """The full sentences of stage 2."""
    count = len(scene.things)
    opening = f"The picture shows {NUMBERS[count]} object{'s' if count > 1 else ''}."
    return " ".join([opening, *(f"{str(t).capitalize()} is at the {t.place}." for t in scene.things)])


def parse(text: str) -> set[Thing]:
    """The objects that an answer names in full, from a caption or a description."""
    return {Thing(p, size, colour, shape) for size, colour, shape, p in _ANSWER.findall(text.lower())}


def questions(scene: Scene, rng: Random) -> list[tuple[str, str]]:
    """Questions about a scene with their answers, in random order."""
    count, first = len(scene.things), rng.choice(scene.things)
    by_place = {thing.place: thing for thing in scene.things}
    place = rng.choice([first.place, rng.choice(PLACES)])
    found = str(by_place[place]).capitalize() if place in by_place else "Nothing"
    colour, shape = rng.choice([(first.colour, first.shape), (rng.choice(list(COLOURS)), rng.choice(SHAPES))])
    pairs = [
        ("How many objects are there?", f"There {'are' if count > 1 else 'is'} {NUMBERS[count]}."),
        (f"What is at the {place}?", f"{found} is at the {place}."),
        _is_there(scene, colour, shape),
    ]
    if [t.shape for t in scene.things].count(first.shape) == 1:  # otherwise "the circle" would be ambiguous
        pairs.append((f"What colour is the {first.shape}?", f"The {first.shape} is {first.colour}."))
        pairs.append((f"Where is the {first.shape}?", f"The {first.shape} is at the {first.place}."))
    rng.shuffle(pairs)
    return pairs


def yes_no_question(scene: Scene, rng: Random) -> tuple[str, str]:
    """Whether an object is there, with the answer: half of the questions take colour and shape from one object."""
    thing, taken = rng.choice(scene.things), rng.choice(("both", "both", "both", "colour", "shape", "neither"))
    colour = thing.colour if taken in ("both", "colour") else rng.choice(list(COLOURS))
    shape = thing.shape if taken in ("both", "shape") else rng.choice(SHAPES)
    return _is_there(scene, colour, shape)


def _is_there(scene: Scene, colour: str, shape: str) -> tuple[str, str]:
    exists = any((t.colour, t.shape) == (colour, shape) for t in scene.things)
    return f"Is there a {colour} {shape}?", "Yes." if exists else "No."


def write_shards(folder: Path, num_shards: int, scenes_per_shard: int, seed: int) -> None:
    """Writes stage-1 data as img2dataset does: NNNNN.tar (KEY.jpg, KEY.json, KEY.txt) beside NNNNN_stats.json."""
    rng = Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(scenes_per_shard):
                scene, key = draw_scene(rng), f"{shard:05d}{index:04d}"
                text = caption(scene)
                record = json.dumps({"key": key, "caption": text, "status": "success"}).encode()
                members = {"jpg": jpeg(render(scene, rng)), "json": record, "txt": text.encode()}
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        stats = {"count": scenes_per_shard, "successes": scenes_per_shard, "failed_to_download": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats), encoding="utf-8")


def write_alignment(
    folder: Path, num_scenes: int, seed: int, held_out: bool = False, describe: Callable[[Scene], str] = description
) -> list[Scene]:
    """Writes filter_cap.json and image/N.jpg as cc_sbu_align has them; also serves for the held-out scenes."""
    rng = Random(seed)
    (folder / "image").mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene(rng, held_out) for _ in range(num_scenes)]
    for index, scene in enumerate(scenes):
        (folder / "image" / f"{index}.jpg").write_bytes(jpeg(render(scene, rng)))
    annotations = [{"image_id": str(i), "caption": describe(scene)} for i, scene in enumerate(scenes)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}), encoding="utf-8")
    return scenes


def share_fully_right(scenes: list[Scene], answers: list[str]) -> float:
    """Share of true objects that the answers name right in shape, colour, size and place."""
    hits = sum(len(set(s.things) & parse(a)) for s, a in zip(scenes, answers, strict=True))
    return hits / sum(len(s.things) for s in scenes)


def all_attribute_words() -> list[str]:
    """Every word that can occur between the image tags, including the filler."""
    return [*SIZES, *COLOURS, *SHAPES, *PLACES, FILLER]

"""Images for the examples of the web page: of the loaded model's data set, or drawings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = 768  # drawn large and scaled down, which smooths the edges
QUESTIONS = ("Describe this image in detail.", "How many objects are there?", "What is at the left?")


def find_examples(config: Mapping[str, Any]) -> list[Path]:
    """Up to three images of the first data set of a configuration, if it is a folder on this machine."""
    dataset = next(iter((config.get("datasets") or {}).values()), None) or {}
    storage = (dataset.get("build_info") or {}).get("storage")
    images = Path(storage).glob("image/*.jpg") if isinstance(storage, str) else ()
    return sorted(images, key=lambda path: (len(path.name), path.name))[:3]


def draw_examples(folder: Path) -> list[Path]:
    """Writes three drawings, which fit to ``QUESTIONS``, and returns their paths."""
    paths = []
    for name, draw in (("house", _house), ("balls", _balls), ("fruit", _fruit)):
        image = Image.new("RGB", (SIZE, SIZE), "white")
        draw(ImageDraw.Draw(image))
        paths.append(folder / f"{name}.png")
        image.resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS).save(paths[-1])
    return paths


def _house(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, 520), "#bfe3f7")
    draw.rectangle((0, 520, SIZE, SIZE), "#7fb867")
    draw.ellipse((570, 60, 700, 190), "#f9cf3f")
    draw.rectangle((190, 330, 530, 620), "#f3e3c8")
    draw.polygon([(150, 340), (360, 170), (570, 340)], "#b5452f")
    draw.rectangle((320, 460, 400, 620), "#7a4b2a")
    for left in (220, 430):
        draw.rectangle((left, 400, left + 70, 470), "#5f8fb0")
    draw.rectangle((640, 480, 670, 620), "#7a4b2a")
    draw.ellipse((570, 320, 740, 520), "#3f8f4a")


def _balls(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, SIZE), "#eef1f4")
    for x, y, radius, color in ((220, 250, 120, "#d8382f"), (540, 300, 150, "#2f62c8"), (330, 560, 110, "#efb92b")):
        draw.ellipse((x - radius, y + radius - 10, x + radius, y + radius + 30), "#d3d8de")
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def _fruit(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, 500), "#f6efe3")
    draw.rectangle((0, 500, SIZE, SIZE), "#a9794c")
    draw.ellipse((90, 330, 330, 570), "#cf3a34")
    draw.line((210, 350, 230, 280), "#6b4423", 14)
    draw.ellipse((225, 270, 310, 315), "#4f9a4b")
    draw.polygon(
        [(470, 520), (500, 360), (560, 250), (600, 250), (590, 330), (640, 520), (600, 580), (520, 580)], "#a8bf3f"
    )
    draw.line((580, 255, 590, 200), "#6b4423", 14)

"""Writes benchmarks of the held-out scenes, whose content is known: POPE, CHAIR and captions in the published layouts.

python -m quickstart.benchmarks
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from quickstart import scenes
from quickstart.scenes import Scene

Kind = tuple[str, str]  # colour and shape
KINDS = [(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES]


def kinds(scene: Scene) -> list[Kind]:
    """The kinds of a scene's objects, each once."""
    return list(dict.fromkeys((thing.colour, thing.shape) for thing in scene.things))


def absent_kinds(all_scenes: list[Scene], rng: Random) -> dict[str, Callable[[Scene, int], list[Kind]]]:
    """POPE's three ways to choose objects that are not there: any, frequent ones, and ones like those that are."""
    frequent = [kind for kind, _ in Counter(kind for scene in all_scenes for kind in kinds(scene)).most_common()]

    def others(scene: Scene) -> list[Kind]:
        return [kind for kind in frequent if kind not in kinds(scene)]

    def likeness(scene: Scene, kind: Kind) -> int:
        return max((kind[0] == colour) + (kind[1] == shape) for colour, shape in kinds(scene))

    return {
        "random": lambda scene, number: rng.sample(others(scene), number),
        "popular": lambda scene, number: others(scene)[:number],
        "adversarial": lambda scene, number: sorted(others(scene), key=lambda kind: -likeness(scene, kind))[:number],
    }


def write_pope(folder: Path, all_scenes: list[Scene], rng: Random) -> None:
    """As many questions for objects that are there as for others, JSON lines as POPE's files."""
    for name, choose in absent_kinds(all_scenes, rng).items():
        rows: list[dict[str, Any]] = []
        for number, scene in enumerate(all_scenes):
            own = kinds(scene)
            for pair in zip(own, choose(scene, len(own)), strict=True):
                for label, (colour, shape) in zip(("yes", "no"), pair, strict=True):
                    text = f"Is there a {colour} {shape}?"
                    row = {"question_id": len(rows) + 1, "image": f"{number}.jpg", "text": text, "label": label}
                    rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"scenes_pope_{name}.json").write_text(text, encoding="utf-8")


def write_coco(folder: Path, all_scenes: list[Scene]) -> None:
    """Captions and instances in COCO's layout, and the names of the objects for CHAIR."""
    names = {f"{colour} {shape}": number for number, (colour, shape) in enumerate(KINDS, 1)}
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(len(all_scenes))]
    captions = [
        {"id": number, "image_id": number, "caption": scenes.description(scene)}
        for number, scene in enumerate(all_scenes)
    ]
    instances = [
        {"image_id": number, "category_id": names[" ".join(kind)]}
        for number, scene in enumerate(all_scenes)
        for kind in kinds(scene)
    ]
    categories = [{"id": number, "name": name} for name, number in names.items()]
    files = {
        "captions_scenes.json": {"images": images, "annotations": captions},
        "instances_scenes.json": {"images": images, "annotations": instances, "categories": categories},
        "objects.json": {"classes": {name: [name] for name in names}, "double_words": {name: name for name in names}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def write_benchmarks(folder: Path, held_out: list[Scene]) -> None:
    """Writes all files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pope(folder, held_out, Random(4))
    write_coco(folder, held_out)


def main() -> None:
    """Writes the benchmarks, and the held-out scenes again."""
    from quickstart.__main__ import NUM_HELD_OUT, OUTPUT

    held_out = scenes.write_alignment(OUTPUT / "held_out", NUM_HELD_OUT, seed=3, held_out=True)
    write_benchmarks(OUTPUT / "benchmarks", held_out)
    print(f"{OUTPUT / 'benchmarks'} has benchmarks of {NUM_HELD_OUT} scenes.")


if __name__ == "__main__":
    main()

"""Trains MiniGPT-v2's tasks with boxes on small scenes, and measures them on held-out scenes before and after.

python -m quickstart.grounding
"""

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from PIL import Image

from minigpt4.common import boxes
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.models import MiniGPT4
from minigpt4.processors import eval_image_processor
from minigpt4.runners.checkpoints import newest
from minigpt4.serve.page_boxes import draw
from quickstart import scenes
from quickstart.__main__ import OUTPUT, ROOT
from quickstart.grounding_backbones import IMAGE_SIZE, box_text, grounded_caption, phrase

FOLDER = OUTPUT / "grounding"
NUM_SCENES, NUM_HELD_OUT = 3000, 200
REFER, IDENTIFY = "[refer] give me the location of {} ", "[identify] what object is in this location {} "


class Target(NamedTuple):
    """An object of a written image: its name, which no other object of the image has, and its box."""

    image: str
    name: str
    box: scenes.Box


def write_images(folder: Path, num_scenes: int, seed: int, held_out: bool = False) -> tuple[list[Target], list[dict]]:
    """Writes images under names of COCO; returns the objects in them and captions with boxes in Flickr30k's layout."""
    rng, targets, captions = Random(seed), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_scenes):
        scene, name = scenes.draw_scene(rng, held_out), f"COCO_train2014_{number:012}"
        image, found = scenes.render_with_boxes(scene, rng, IMAGE_SIZE)
        (folder / f"{name}.jpg").write_bytes(scenes.jpeg(image))
        captions.append({"image_id": name, "grounded_caption": grounded_caption(scene, found)})
        names = [*map(phrase, scene.things)]
        pairs = zip(names, found, strict=True)
        targets += [Target(f"{name}.jpg", own, box) for own, box in pairs if names.count(own) == 1]
    return targets, captions


def write_data() -> list[Target]:
    """Writes the files of RefCOCO and Flickr30k in their published layouts; returns the held-out objects."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    targets, captions = write_images(FOLDER / "images", NUM_SCENES, seed=1)
    (FOLDER / "groundedcaption.json").write_text(json.dumps(captions), encoding="utf-8")
    refs, annotations = [], []
    for number, (image, name, (left, top, right, bottom)) in enumerate(targets):
        image_id = int(image.removesuffix(".jpg").rpartition("_")[2])
        ids = {"ref_id": number, "ann_id": number, "image_id": image_id, "category_id": 1, "sent_ids": [number]}
        sentence = {"sent_id": number, "raw": name, "sent": name, "tokens": name.split()}
        refs.append(ids | {"split": "train", "file_name": image, "sentences": [sentence]})
        bbox = [left, top, right - left, bottom - top]
        annotations.append({"id": number, "image_id": image_id, "category_id": 1, "bbox": bbox})
    names = {target.image: int(target.image[15:27]) for target in targets}
    sizes = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = [{"id": image_id, "file_name": name} | sizes for name, image_id in names.items()]
    categories = [{"id": 1, "name": "object"}]
    (FOLDER / "refcoco").mkdir()
    (FOLDER / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    content = {"images": images, "annotations": annotations, "categories": categories}
    (FOLDER / "refcoco" / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    return write_images(FOLDER / "held_out", NUM_HELD_OUT, seed=2, held_out=True)[0]


@torch.inference_mode()
def measure(name: str, ckpt: Path | None, held_out: Sequence[Target]) -> tuple[str, list[str], list[str]]:
    """A row of the table, and the answers to ``[refer]`` and ``[identify]``."""
    options = [f"model.ckpt={ckpt or 'null'}"]
    path = ROOT / "eval_configs" / "quickstart_grounding_eval.yaml"
    cfg = Config(argparse.Namespace(cfg_path=path, options=options)).check()
    torch.manual_seed(0)  # for the untrained projection
    model = MiniGPT4.from_config(cfg.model_cfg).eval()
    processor = eval_image_processor(cfg)
    places, names = [], []
    for start in range(0, len(held_out), 50):
        batch = held_out[start : start + 50]
        images = torch.stack([processor(Image.open(FOLDER / "held_out" / t.image).convert("RGB")) for t in batch])
        for answers, questions in (
            (places, [REFER.format(target.name) for target in batch]),
            (names, [IDENTIFY.format(box_text(target.box)) for target in batch]),
        ):
            prompts = [model.prompt_template.format(f"<Img><ImageHere></Img> {question}") for question in questions]
            answers += model.generate(images.to(model.device), prompts, max_new_tokens=30)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    found = [boxes.answer_box(answer, *size) for answer in places]
    hits = sum(
        box is not None and boxes.box_iou(box, target.box) > boxes.IOU_THRESHOLD
        for box, target in zip(found, held_out, strict=True)
    )
    num_named = sum(answer == target.name for answer, target in zip(names, held_out, strict=True))
    return f"| {name} | {hits / len(held_out):.1%} | {num_named / len(held_out):.1%} |", places, names


def draw_sheet(path: Path, held_out: Sequence[Target], answers: Sequence[str], columns: int = 4, rows: int = 3) -> None:
    """Draws the answered boxes, with the names that were asked for, on images with different ones."""
    sheet = Image.new("RGB", (columns * 320, rows * 320), "white")
    one_each = {target.image: number for number, target in enumerate(held_out)}
    for place, number in enumerate([*one_each.values()][: columns * rows]):
        target = held_out[number]
        image = draw(f"<p>{target.name}</p> {answers[number]}", Image.open(FOLDER / "held_out" / target.image))
        sheet.paste(image.resize((312, 312)), (place % columns * 320 + 4, place // columns * 320 + 4))
    sheet.save(path)


def main() -> None:
    """Writes the data, trains, and prints a table."""
    start = time.time()
    try:
        held_out = write_data()
        rows = [measure("before training", None, held_out)]
        command = [sys.executable, "train.py", "--cfg-path", "train_configs/quickstart_grounding.yaml"]
        subprocess.run(command, check=True, cwd=ROOT)
        shutil.copy(newest(FOLDER / "run"), FOLDER / "checkpoint.pth")
        rows.append(measure("after training", FOLDER / "checkpoint.pth", held_out))
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: train.py ended with status {error.returncode}; its messages are above.")
    draw_sheet(FOLDER / "boxes.png", held_out, rows[-1][1])
    print(f"\n{len(held_out)} objects of {NUM_HELD_OUT} held-out scenes:\n")
    print("| | [refer]: boxes with IoU over 0.5 | [identify]: names fully right |\n|---|---|---|")
    print("\n".join(row for row, _, _ in rows))
    print(f"\nBoxes: {FOLDER / 'boxes.png'}. It took {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()

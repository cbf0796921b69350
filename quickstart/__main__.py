"""Runs both stages on small generated scenes and reports the results: a table, a loss curve, a sheet of answers.

python -m quickstart
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image

from evaluate import evaluate
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.datasets.datasets.pairs import read_align_folder
from minigpt4.models import MiniGPT4
from minigpt4.processors import eval_image_processor
from minigpt4.runners.checkpoints import newest
from quickstart import scenes
from quickstart.benchmarks import write_benchmarks

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "output" / "quickstart"
NUM_HELD_OUT = 200
QUESTION = "Describe this image in detail."


def write_data() -> list[scenes.Scene]:
    """Writes shards, alignment folder and held-out images; returns the held-out scenes."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    scenes.write_shards(OUTPUT / "shards", num_shards=8, scenes_per_shard=1000, seed=1)
    scenes.write_alignment(OUTPUT / "align", num_scenes=2000, seed=2)
    held_out = scenes.write_alignment(OUTPUT / "held_out", num_scenes=NUM_HELD_OUT, seed=3, held_out=True)
    write_benchmarks(OUTPUT / "benchmarks", held_out)
    return held_out


def train(stage: int) -> None:
    """Runs train.py on a stage's YAML file, as a user would, and copies its last checkpoint to a fixed name."""
    command = [sys.executable, "train.py", "--cfg-path", f"train_configs/quickstart_stage{stage}.yaml"]
    print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)
    folder = OUTPUT / f"stage{stage}"
    shutil.copy(newest(folder), folder / "checkpoint.pth")


@torch.inference_mode()
def measure(
    name: str,
    ckpt: Path | None,
    held_out: list[scenes.Scene],
    folder: Path = OUTPUT / "held_out",
    more_options: Sequence[str] = (),
    has_conversations: bool = False,
) -> dict[str, Any]:
    """The loss on the held-out scenes, and the share of their objects that the model's answers name fully right.

    The loss is that of captions behind a prompt, or with ``has_conversations`` of answers in a chat.
    """
    options = [f"model.ckpt={ckpt if ckpt else 'null'}", *more_options]
    cfg = Config(argparse.Namespace(cfg_path=ROOT / "eval_configs" / "quickstart_eval.yaml", options=options)).check()
    torch.manual_seed(0)  # for the untrained projection
    model = MiniGPT4.from_config(cfg.model_cfg)
    model.prompt_list = model.prompt_list[:1]
    processor, pairs = eval_image_processor(cfg), read_align_folder(folder, "held_out")
    chat, answers, loss = Chat(model, processor, model.device), [], 0.0
    for start in range(0, len(pairs), 50):
        batch = pairs[start : start + 50]
        images = torch.stack([processor(Image.open(pair.image).convert("RGB")) for pair in batch])
        samples = {"image": images, "text_input": [pair.caption for pair in batch]}
        if has_conversations:
            turns = [[(f"{IMAGE_PLACEHOLDER}\n{QUESTION}", pair.caption)] for pair in batch]
            samples |= {"num_images": [1] * len(batch), "conversation": [{"turns": turn} for turn in turns]}
        loss += model(samples)["loss"].item() * len(batch)
        convs, img_lists = [CONV_VISION.copy() for _ in batch], [[] for _ in batch]
        for image, conv, img_list in zip(images, convs, img_lists, strict=True):
            chat.upload_img(image, conv, img_list)
            chat.ask(QUESTION, conv)
        greedy = GenerationOptions(max_new_tokens=80, do_sample=False)
        answers += [text for text, _ in chat.answer_batch(convs, img_lists, greedy)]
    num_invented = sum(len(scenes.parse(a) - set(s.things)) for s, a in zip(held_out, answers, strict=True))
    share = scenes.share_fully_right(held_out, answers)
    return {"name": name, "loss": loss / len(pairs), "share": share, "num_invented": num_invented, "answers": answers}


def run_benchmarks(name: str, ckpt: Path | None) -> dict[str, float]:
    """POPE's accuracy on random objects, CHAIRi and CIDEr on the held-out scenes, by evaluate.py."""
    flags = dict.fromkeys(("resample", "score_only", "api_url", "api_model", "gpu_id"))
    flags |= {"cfg_path": ROOT / "eval_configs" / "quickstart_benchmarks.yaml", "dataset": "pope,chair,coco_caption"}
    options = [f"model.ckpt={ckpt if ckpt else 'null'}", "evaluation_datasets.pope.splits=[scenes_random]"]
    rows = evaluate(argparse.Namespace(**flags, options=options, out=OUTPUT / "evaluation" / name.replace(" ", "_")))
    chosen = {"accuracy": "official", "CHAIRi": "lemma_table", "CIDEr": "simple"}
    return {row["metric"]: row["value"] or 0.0 for row in rows if chosen.get(row["metric"]) == row["variant"]}


def draw_losses(path: Path) -> None:
    """Plots the training loss of both stages, from their metrics.jsonl."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    offset = 0
    for stage in (1, 2):
        file = max((OUTPUT / f"stage{stage}").glob("*/metrics.jsonl"))
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "loss" in row]
        axes.plot([offset + row["step"] for row in rows], [row["loss"] for row in rows], label=f"stage {stage}")
        offset += rows[-1]["step"] + 1
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", yscale="log", title="Training the projection")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_sheet(path: Path, held_out: list[scenes.Scene], answers: list[str], num_rows: int = 4) -> None:
    """Plots held-out images with the model's answers; a green frame: all objects are right and none is invented."""
    figure, grid = pyplot.subplots(num_rows, 4, figsize=(13, 4.2 * num_rows))
    for i, axes in enumerate(grid.flat):
        axes.imshow(Image.open(OUTPUT / "held_out" / "image" / f"{i}.jpg"))
        is_right = scenes.parse(answers[i]) == set(held_out[i].things)
        for spine in axes.spines.values():
            spine.set(color="green" if is_right else "red", linewidth=4)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(answers[i].replace(". ", ".\n"), fontsize=9)
    figure.suptitle(f"“{QUESTION}”: images that were not in the training data")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Writes the data, runs both stages, and measures before, between and after them."""
    start = time.time()
    try:
        held_out = write_data()
        rows = []
        for stage, name in enumerate(("before training", "after stage 1", "after stage 2")):
            if stage:
                train(stage)
            ckpt = OUTPUT / f"stage{stage}" / "checkpoint.pth" if stage else None
            rows.append(measure(name, ckpt, held_out) | run_benchmarks(name, ckpt))
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[1:])} ended with status {error.returncode}; its messages are above.")
    draw_losses(OUTPUT / "loss.png")
    draw_sheet(OUTPUT / "answers.png", held_out, rows[-1]["answers"])
    num_objects = sum(len(scene.things) for scene in held_out)
    print(f"\n{NUM_HELD_OUT} held-out scenes with {num_objects} objects:\n")
    columns = "held-out loss", "objects fully right", "objects invented", "POPE accuracy", "CHAIRi", "CIDEr"
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in rows:
        values = [f"{row['loss']:.3f}", f"{row['share']:.1%}", row["num_invented"]]
        values += [f"{row['accuracy']:.1%}", f"{row['CHAIRi']:.1%}", f"{row['CIDEr']:.2f}"]
        print(f"| {row['name']} | {' | '.join(map(str, values))} |")
    ceilings = json.loads((ROOT / "quickstart" / "weights" / "pretraining.json").read_text(encoding="utf-8"))
    for side in ("vision", "text"):
        own = [(name.rpartition(" ")[2], share) for name, share in ceilings[side].items() if name != "steps"]
        shares = ", ".join(f"{share:.1%} of {name}" for name, share in own)
        print(f"\nCeiling of the frozen {side} side alone: {shares}", end="")
    print(f"\n\nFigures: {OUTPUT / 'loss.png'}, {OUTPUT / 'answers.png'}")
    print(f"It took {time.time() - start:.0f} s. Now ask the model a question:\n")
    image = (OUTPUT / "held_out" / "image" / "0.jpg").relative_to(ROOT)
    print(f'python demo.py --cfg-path eval_configs/quickstart_eval.yaml --image {image} --greedy --ask "{QUESTION}"')


if __name__ == "__main__":
    main()

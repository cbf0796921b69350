"""Trains captions in a wording that the frozen language model has never seen: the projection alone, and with LoRA.

python -m quickstart       # before, for the checkpoint of stage 1
python -m quickstart.lora
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from minigpt4.common.errors import UserError
from minigpt4.runners.checkpoints import newest
from quickstart import scenes
from quickstart.__main__ import NUM_HELD_OUT, OUTPUT, QUESTION, ROOT, measure

FOLDER = OUTPUT / "lora"
STAGE1 = OUTPUT / "stage1" / "checkpoint.pth"
LORA = "model.lora_r=16", "model.lora_target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
NO_LORA = "model.lora_r=0", "model.lora_target_modules=[q_proj,v_proj]"  # the defaults
_SENTENCE = re.compile(r"at (\S+) i see one (\w+), which is (\w+) and (\w+)\.")


def new_wording(scene: scenes.Scene) -> str:
    """A description in other words and another order than the language model was trained with."""
    return " ".join(f"At {t.place} I see one {t.shape}, which is {t.colour} and {t.size}." for t in scene.things)


def parse(text: str) -> set[scenes.Thing]:
    """The objects that an answer names in the new wording."""
    return {scenes.Thing(place, size, colour, shape) for place, shape, colour, size in _SENTENCE.findall(text.lower())}


def write_conversations(folder: Path, descriptions: list[scenes.Scene]) -> None:
    """Writes the scenes of a folder as conversations in LLaVA's form, as they are trained in the form of a chat."""
    rows = []
    for number, scene in enumerate(descriptions):
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": new_wording(scene)}]
        rows.append({"image": f"image/{number}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def train(name: str, *options: str) -> None:
    """Runs stage 2 on the conversations from the checkpoint of stage 1."""
    command = [sys.executable, "train.py", "--cfg-path", "train_configs/quickstart_lora.yaml", "--options"]
    subprocess.run([*command, f"run.output_dir={FOLDER / name}", *options], check=True, cwd=ROOT)
    shutil.copy(newest(FOLDER / name), FOLDER / f"{name}.pth")


def main() -> None:
    """Writes the data, trains both, and prints a table."""
    if not STAGE1.is_file():
        sys.exit(f"error: {STAGE1} is missing; first run: python -m quickstart")
    start, rows = time.time(), []
    shutil.rmtree(FOLDER, ignore_errors=True)
    trained = scenes.write_alignment(FOLDER / "train", 2000, seed=2, describe=new_wording)
    write_conversations(FOLDER / "train", trained)
    folder = FOLDER / "held_out"
    held_out = scenes.write_alignment(folder, NUM_HELD_OUT, seed=3, held_out=True, describe=new_wording)
    try:
        for name, options in {"projection": NO_LORA, "projection_and_lora": LORA}.items():
            begin = time.time()
            train(name, *options)
            seconds = time.time() - begin
            rows.append((name, seconds, measure(name, FOLDER / f"{name}.pth", held_out, folder, options, True)))
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: train.py ended with status {error.returncode}; its messages are above.")
    print("\n| trained | held-out loss | answers in the new wording | objects fully right |\n|---|---|---|---|")
    num_objects = sum(len(scene.things) for scene in held_out)
    for name, _, row in rows:
        found = [parse(answer) for answer in row["answers"]]
        in_wording = sum(not _SENTENCE.sub("", answer.lower()).strip() and answer != "" for answer in row["answers"])
        num_right = sum(len(things & set(scene.things)) for things, scene in zip(found, held_out, strict=True))
        shares = f"{in_wording / NUM_HELD_OUT:.1%} | {num_right / num_objects:.1%}"
        print(f"| {name.replace('_', ' ')} | {row['loss']:.3f} | {shares} |")
    print(f"\nAsked for: {new_wording(held_out[0])}")
    for name, seconds, row in rows:
        print(f"{name}: {row['answers'][0]} (trained in {seconds:.0f} s)")
    print(f"It took {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()

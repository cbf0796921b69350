"""Writes the training questions of easy-vqa (pip install --no-deps easy-vqa) as conversations.

python -m quickstart.easy_vqa; docs/EVALUATION.md has the commands that follow.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from quickstart.__main__ import OUTPUT

TURNS = 5  # questions of a row, which share its image


def conversations(questions: list[tuple[str, str, int]], folder: Path, rng: Random) -> list[dict[str, Any]]:
    """Rows in LLaVA's form: the questions about an image in random order, five in a row, with answers as sentences."""
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in questions:
        by_image.setdefault(image_id, []).append((question, f"{answer.capitalize()}."))
    rows = []
    for image_id, pairs in by_image.items():
        rng.shuffle(pairs)
        for start in range(0, len(pairs), TURNS):
            turns = []
            for question, answer in pairs[start : start + TURNS]:
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            rows.append({"image": str(folder / "images" / f"{image_id}.png"), "conversations": turns})
    return rows


def main() -> None:
    """Writes output/quickstart/easy_vqa/train.json, and what.json without the questions of yes and no."""
    spec = find_spec("easy_vqa")
    if spec is None:
        sys.exit("error: easy-vqa is missing; install it: pip install --no-deps easy-vqa")
    folder, out = Path(spec.origin).parent / "data" / "train", OUTPUT / "easy_vqa"
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    what = [row for row in questions if row[1] not in ("yes", "no")]
    for name, chosen in {"what.json": what, "train.json": questions}.items():
        rows = conversations(chosen, folder, Random(1))
        (out / name).write_text(json.dumps(rows), encoding="utf-8")
        print(f"{len(chosen)} questions in {len(rows)} conversations: {out / name}")


if __name__ == "__main__":
    main()

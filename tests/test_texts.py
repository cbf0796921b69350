"""Texts of users, whatever reads them: UTF-8, a byte order mark is ignored; other bytes are named with the line."""

import json

import pytest
from confined import told

from minigpt4.common.config import _read_yaml
from minigpt4.datasets.datasets.base_dataset import BaseDataset
from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs
from minigpt4.models.loading import read_prompts
from minigpt4.serve.batch import find_questions

ROW = {"image": "a.jpg", "caption": "é", "question": "é"}
ANNOTATIONS = json.dumps({"annotations": [{"image_id": "a", "caption": "é"}]}, ensure_ascii=False, indent=1)
READERS = {  # name of a file: its text, and what reads a text from it
    "own.jsonl": (f"\n{json.dumps(ROW, ensure_ascii=False)}\n", lambda file: read_pairs(file, "KEY")[0].caption),
    "rows.jsonl": (f"\n{json.dumps(ROW, ensure_ascii=False)}\n", lambda file: find_questions(file, "")[0].text),
    "filter_cap.json": (ANNOTATIONS, lambda file: read_align_folder(file.parent, "KEY")[0].caption),
    "annotations.json": (ANNOTATIONS, lambda file: BaseDataset(ann_paths=[file]).annotation[0]["caption"]),
    "prompts.txt": ("<ImageHere>\n<ImageHere>é", lambda file: read_prompts(str(file), "{}")[1][-1]),
    "run.yaml": ("model:\n  arch: é\n", lambda file: _read_yaml(file).model.arch),
}


@pytest.mark.parametrize("name", READERS)
def test_encodings(tmp_path, name):
    text, read = READERS[name]
    file = tmp_path / name
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(text, encoding=encoding)
        assert read(file) == "é"
    file.write_text(text, encoding="latin-1")
    line = text[: text.index("é")].count("\n") + 1
    told(lambda: read(file), str(file), f"is not UTF-8 text (byte 0xe9 in line {line}); save it as UTF-8")

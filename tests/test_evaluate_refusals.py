"""What evaluate.py refuses before anything is answered or scored: annotations, sections and answers that are wrong."""

import json
import sys
from contextlib import closing

import pytest

from minigpt4.common.errors import UserError
from minigpt4.evaluation.answers import AnswerFile, read_answers
from minigpt4.evaluation.items import Item
from minigpt4.evaluation.tasks import find_work


class Configuration:
    """Sections of benchmarks as ``find_work`` reads them."""

    def __init__(self, **sections):
        self.config = {"evaluation_datasets": sections}


POPE_ROW = {"question_id": 1, "image": "a.jpg", "text": "Is there a car?", "label": "yes"}
WRONG_FILES = {
    "a file of another benchmark": ([{"image": "a.jpg", "question": "?", "answer": "x"}], "no 'question_id'"),
    "an object": ({"info": 1}, "expected a list"),
    "duplicates": ([POPE_ROW, POPE_ROW], "question 1 occurs twice"),
    "no rows": ([], "no rows to evaluate"),
    "another label": ([POPE_ROW | {"label": "maybe"}], "expected yes or no"),
    "a missing image": ([POPE_ROW], "1 of 1 images are missing.*a.jpg"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_annotations_are_refused(case, tmp_path):
    content, message = WRONG_FILES[case]
    (tmp_path / "file.json").write_text(json.dumps(content))
    section = {"eval_file_path": str(tmp_path / "file.json"), "img_path": str(tmp_path)}
    with pytest.raises(UserError, match=message):
        find_work(Configuration(pope=section), None)


@pytest.mark.parametrize("name", ["coco_caption", "aokvqa", "iconvqa", "caption_loss", "vqav2", "chair", "easy_vqa"])
@pytest.mark.parametrize("content", [{"images": [1], "annotations": [{}]}, [{}], 5, [[1, 2, 3]], {"a": [5]}, "text"])
def test_files_of_any_other_layout_are_refused(name, content, tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps(content))
    path = tmp_path if name in ("vqav2", "easy_vqa") else tmp_path / "questions.json"
    with pytest.raises(UserError, match=f"evaluation_datasets.{name}"):
        find_work(Configuration(**{name: {"eval_file_path": str(path)}}), None)


def test_wrong_sections_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluation_datasets.pop: 'pop' is no benchmark.*pope"):
        find_work(Configuration(pop={}), None)
    with pytest.raises(UserError, match=r"--dataset.*'gqa'.*pope"):
        find_work(Configuration(pope={}), "gqa")
    with pytest.raises(UserError, match=r"--dataset.*''.*pope"):
        find_work(Configuration(pope={}), "")  # as of an unset shell variable
    with pytest.raises(UserError, match="there is no file"):
        find_work(Configuration(pope={"eval_file_path": str(tmp_path / "none.json")}), None)
    with pytest.raises(UserError, match=r"'ofical'.*official"):
        find_work(Configuration(pope={"variants": ["ofical"]}), None)
    with pytest.raises(UserError, match=r"imgpath.*img_path"):
        find_work(Configuration(pope={"imgpath": "x"}), None)
    with pytest.raises(UserError, match=r"pope\.eval_file_path is not set"):
        find_work(Configuration(pope={}), None)
    with pytest.raises(UserError, match=r"pope\.eval_file_path is still the placeholder"):
        find_work(Configuration(pope={"eval_file_path": "/path/to/POPE"}), None)
    (tmp_path / "two.json").write_text(json.dumps([POPE_ROW, POPE_ROW | {"question_id": 2, "text": "Is there a dog?"}]))
    with pytest.raises(UserError, match=r"prompt has no \{question\}"):
        find_work(Configuration(pope={"eval_file_path": str(tmp_path / "two.json"), "prompt": "Why?"}), None)
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A car."}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    section = {"eval_file_path": str(tmp_path / "captions.json"), "prompt": ""}
    with pytest.raises(UserError, match=r"coco_caption\.prompt is empty"):
        find_work(Configuration(coco_caption=section), None, needs_images=False)
    with pytest.raises(UserError, match=r"--out: .* cannot be written"):
        AnswerFile(tmp_path / "two.json", "pope")
    (tmp_path / "subset.json").write_text("[77]")
    (tmp_path / "file.json").write_text(json.dumps([POPE_ROW]))
    section = {"eval_file_path": str(tmp_path / "file.json"), "subset": str(tmp_path / "subset.json")}
    with pytest.raises(UserError, match="no rows to evaluate"):
        find_work(Configuration(pope=section), None)


@pytest.mark.parametrize(("first", "second"), [((0, 1), (0, 1)), ((0, 1), (1, 2)), ((1, 2), (0, 1)), ((0, 2), (0, 4))])
def test_a_second_run_does_not_write_to_the_same_folder(first, second, tmp_path):
    """Each run is (rank, number of processes)."""
    with closing(AnswerFile(tmp_path, "pope", *first)) as file:
        file.append([{"question_id": 1, "answer": "Yes"}])
        with pytest.raises(UserError, match="are being written by another run"):
            AnswerFile(tmp_path, "pope", *second)
    with closing(AnswerFile(tmp_path, "pope", *second)) as file:
        assert list(file.rows) == [("1", 0)]


@pytest.mark.parametrize(
    ("benchmark", "variant", "module"),
    [("chair", "opera_nltk", "nltk"), ("coco_caption", "ptb", "pycocoevalcap.tokenizer.ptbtokenizer")],
)
def test_what_a_variant_needs_is_checked_before_anything_is_read(benchmark, variant, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{variant}.* needs {module.split('.')[0]}.*pip install"):
        find_work(Configuration(**{benchmark: {"eval_file_path": "none", "variants": [variant]}}), None)


WRONG_ANSWERS = {
    "unknown question": ('{"question_id": 1, "answer": "no"}\n{"question_id": 9, "answer": "no"}', "question 9, which"),
    "duplicate": (
        '{"question_id": 1, "answer": "no"}\n{"question_id": 1, "answer": "yes"}',
        "two answers to question 1",
    ),
    "missing": ('{"question_id": 1, "answer": "no"}', "no answer to 1 of 2 questions, such as 2"),
    "truncated": ('{"question_id": 1, "answer": "no"}\n{"question_id": 2, "ans', "line 2 of"),
    "of another split": (
        '{"question_id": 1, "question": "a?", "answer": "no"}\n{"question_id": 2, "question": "A: b?", "answer": "no"}',
        "has 'a.' as question 1, which is 'b.'",
    ),
    "without ids": ('{"answer": "no"}', "1 rows without ids for 2 questions"),
    "without an answer": ('{"question_id": 1, "reply": "no"}', "question 1 has no answer"),
    "empty": ("", "holds no rows"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_wrong_answer_files_are_refused(case, tmp_path):
    text, message = WRONG_ANSWERS[case]
    (tmp_path / "answers.jsonl").write_text(text)
    items = [Item(name, "a.jpg", "b?", {}) for name in ("1", "2")]
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "answers.jsonl", items)

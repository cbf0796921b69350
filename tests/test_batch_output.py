"""The output of --batch: the fields of its rows, tables, and what may continue it."""

import csv
import json
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest
from confined import told
from pyarrow import parquet
from serving import GREEDY, rows_of

import demo
from minigpt4.serve.batch import answer_questions, describe_settings, find_questions
from minigpt4.serve.batch_output import BatchOutput


def answer(chat, questions, out, **settings):
    """The number of rows with an error."""
    with closing(BatchOutput(out, [question.row for question in questions], settings)) as output:
        return answer_questions(chat, questions, output, GREEDY, batch_size=2)


def open_output(out, questions, **settings):
    return BatchOutput(out, [question.row for question in questions], settings)


@pytest.fixture
def folder(scene_folder, tmp_path):
    """A folder with 0.png to 2.png."""
    for i in range(3):
        os.link(scene_folder / f"{i}.png", tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def questions(folder):
    return find_questions(f"{folder}/*.png", "What?")


ROWS = [
    {"question_id": 7, "image": "0.png", "answer": "a dog", "question": "What?", "nested": {"a": [1, None]}},
    {"question_id": 8, "image": "../{name}/1.png", "error": 0.5, "input_error": "x", "text": "=1,\n\"2\" 你好"},
    {"image": "absent.png", "question": None, "answer": None, "input_answer": 1, "input_input_answer": 2},
]  # fmt: skip
EXPECTED = [
    {"question_id": 7, "image": "0.png", "input_answer": "a dog", "question": "What?", "nested": {"a": [1, None]}},
    {"question_id": 8, "image": "../{name}/1.png", "input_input_error": 0.5, "input_error": "x",
     "text": "=1,\n\"2\" 你好", "question": "Why?"},
    {"image": "absent.png", "question": "Why?", "input_input_input_answer": None, "input_answer": 1,
     "input_input_answer": 2},
]  # fmt: skip


@pytest.fixture
def listed(folder):
    """The questions of a list, and the rows without results that are expected for them."""
    text, expected = (json.dumps(rows).replace("{name}", folder.name) for rows in (ROWS, EXPECTED))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in json.loads(text)), encoding="utf-8")
    return find_questions(str(folder / "rows.jsonl"), "Why?"), json.loads(expected)


def test_rows_keep_their_fields_and_paths(chat, listed, folder):
    questions, expected = listed
    assert answer(chat, questions, folder / "out.jsonl") == 1
    rows = rows_of(folder / "out.jsonl")
    results = [{key: row.pop(key) for key in ("answer", "error") if key in row} for row in rows]
    assert rows == expected and [list(row) for row in rows] == [list(row) for row in expected]
    assert [list(result) for result in results] == [["answer"], ["answer"], ["error"]]
    assert all(isinstance(text, str) and text for result in results for text in result.values())
    assert answer(chat, questions, folder / "out.jsonl") == 1 and len(rows_of(folder / "out.jsonl")) == 3


def interrupt_after(monkeypatch, count):
    """Raises KeyboardInterrupt when this many rows have been written, once."""
    append = BatchOutput.append

    def hooked(output, rows):
        for row in rows:
            append(output, [row])
            if len(output) == count:
                monkeypatch.setattr(BatchOutput, "append", append)
                raise KeyboardInterrupt

    monkeypatch.setattr(BatchOutput, "append", hooked)


def read_table(out):
    if out.suffix == ".parquet":
        return parquet.read_table(out).to_pylist()
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "OUT.CSV"])
def test_tables_have_all_columns_and_are_continued(chat, questions, folder, monkeypatch, name):
    out = folder / name
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        answer(chat, questions, out)
    if name != "OUT.CSV":
        assert len(read_table(out)) == 1  # what is finished is in the table
    assert answer(chat, questions, out) == 0
    with monkeypatch.context() as context:  # nothing is left to do
        context.setattr(chat, "preprocess_image", None)
        whole = out.read_bytes()
        assert answer(chat, questions, out) == 0 and out.read_bytes() == whole
        out.unlink()
        assert answer(chat, questions, out) == 0 and out.read_bytes() == whole
    if name != "OUT.CSV":
        rows = read_table(out)
        assert [row["image"] for row in rows] == [question.path for question in questions]
        assert [list(row) for row in rows] == [["image", "question", "answer", "error"]] * 3
        assert all(row["answer"] and not row["error"] for row in rows)


def test_cells_of_csv(chat, listed, folder):
    questions, expected = listed
    assert answer(chat, questions, folder / "out.csv") == 1
    rows = read_table(folder / "out.csv")
    assert [row["question_id"] for row in rows] == ["7", "8", ""] and json.loads(rows[0]["nested"]) == {"a": [1, None]}
    assert rows[1]["text"] == expected[1]["text"] and rows[0]["input_answer"] == "a dog"
    assert [bool(row["answer"]) for row in rows] == [not row["error"] for row in rows] == [True, True, False]


def test_what_a_table_cannot_store_is_reported_before_anything_is_answered(listed, folder, monkeypatch):
    message = told(lambda: open_output(folder / "out.parquet", listed[0]), "--out", "'input_answer'", ".csv or .jsonl")
    assert "several" in message
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told(lambda: open_output(folder / "out.parquet", []), "out.parquet", "pip install pyarrow")
    told(lambda: find_questions(str(_copy_rows(folder, "rows.parquet")), ""), "--batch", "pip install pyarrow")
    assert sorted(path.suffix for path in folder.iterdir() if path.name.startswith("out")) == []


def _copy_rows(folder, name):
    (folder / name).write_bytes(b"PAR1")
    return folder / name


def test_half_a_surrogate_pair_in_a_table(chat, folder):
    os.link(folder / "0.png", os.fsencode(folder) + b"/caf\xe9.png")
    questions = find_questions(f"{folder}/caf*.png", "What?")
    for name in ("out.csv", "out.parquet"):
        assert answer(chat, questions, folder / name) == 0
        assert read_table(folder / name)[0]["answer"]


def test_questions_from_tables(chat, folder):
    rows = [{"id": "007", "image": "0.png", "question": "Why?"}, {"id": "8", "image": "1.png", "question": ""}]
    with (folder / "in.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    questions = find_questions(str(folder / "in.csv"), "What?")
    assert [question.text for question in questions] == ["Why?", "What?"]
    assert answer(chat, questions, folder / "out.parquet") == 0
    again = find_questions(str(folder / "out.parquet"), "unused")
    assert [question.row["id"] for question in again] == ["007", "8"] and again[0].path == str(folder / "0.png")
    assert again[1].row["question"] == "What?" and again[0].row["input_answer"]


MALFORMED_TABLES = {
    "few cells": ("in.csv", b"image,question\na.png\n", "line 2"),
    "many cells": ("in.csv", b"image\na.png,b\n", "line 2"),
    "names twice": ("in.csv", b"image,image\na.png,b.png\n", "line 2"),
    "an open quote": ("in.csv", b'image\n"a.png\n', "not valid CSV"),
    "no image": ("in.csv", b"question\nWhy?\n", "line 2", "image"),
    "not UTF-8": ("in.csv", b"image\n\xff.png\n", "UTF-8"),
    "no Parquet": ("in.parquet", b"PAR1", "Parquet"),
}


@pytest.mark.parametrize("case", MALFORMED_TABLES)
def test_malformed_tables(tmp_path, case, confined):
    name, data, *words = MALFORMED_TABLES[case]
    (tmp_path / name).write_bytes(data)
    told(lambda: find_questions(str(tmp_path / name), "What?"), "--batch", name, *words)


def test_other_settings_are_refused_by_name(chat, questions, folder):
    out, settings = (
        folder / "out.jsonl",
        {"--temperature": 1.0, "--seed": 42, "model.ckpt": {"file": "a", "sha256": "b"}},
    )
    answer(chat, questions, out, **settings)
    whole = out.read_bytes()
    words = ("--out", "--temperature was 1.0 and is 0.5", "give another file")
    message = told(lambda: answer(chat, questions, out, **settings | {"--temperature": 0.5}), *words)
    assert "--seed" not in message and "ckpt" not in message
    moved = settings | {"model.ckpt": {"file": "other", "sha256": "b"}, "model.new": None}
    assert answer(chat, questions, out, **moved) == 0
    changed = settings | {"model.ckpt": {"file": "a", "sha256": "c"}}
    told(lambda: answer(chat, questions, out, **changed), "model.ckpt was", "'b'", "'c'")
    meta = folder / "out.jsonl.meta.json"
    assert json.loads(meta.read_text(encoding="utf-8")) == settings
    meta.write_text("[", encoding="utf-8")
    told(lambda: answer(chat, questions, out, **settings), "--out", "meta.json", "JSON")
    meta.unlink()
    told(lambda: answer(chat, questions, out, **settings), "--out", "meta.json", "missing")
    assert out.read_bytes() == whole
    out.unlink()
    assert answer(chat, questions, out, **changed) == 0


def test_the_checkpoint_is_compared_by_its_content(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"1")
    (tmp_path / "b.pth").write_bytes(b"2")
    first, second = (
        describe_settings({"ckpt": str(tmp_path / name), "x": 1}, {"top_p": 2}) for name in ("a.pth", "b.pth")
    )
    assert first["model.ckpt"]["sha256"] != second["model.ckpt"]["sha256"]
    assert (first["model.x"], first["--top-p"]) == (1, 2)


def test_a_table_of_another_program_is_left_unchanged(questions, folder):
    (folder / "out.csv").write_text("precious", encoding="utf-8")
    told(lambda: open_output(folder / "out.csv", questions), "--out", "exists", "give another file or remove it")
    assert (folder / "out.csv").read_text(encoding="utf-8") == "precious"


def test_a_second_process_is_refused_until_the_first_one_ends(questions, folder):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        output = open_output(folder / "out.jsonl", questions)
        os.write(writer, b"x")
        signal.pause()
        os._exit(len(output))
    try:
        assert os.read(reader, 1)
        told(lambda: open_output(folder / "out.jsonl", questions), "--out", "another process is writing")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    open_output(folder / "out.jsonl", questions).close()


def test_questions_about_one_image_decode_and_encode_it_once(chat, folder, monkeypatch):
    rows = [{"image": f"{i // 4}.png", "question": f"Question {i}?"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    decoded, preprocess, encoded, encode = [], chat.preprocess_image, [], chat.model.encode_img
    monkeypatch.setattr(chat.model, "encode_img", lambda images: encoded.extend(images) or encode(images))
    monkeypatch.setattr(chat, "preprocess_image", lambda image: decoded.append(image) or preprocess(image))
    assert answer(chat, find_questions(str(folder / "rows.jsonl"), ""), folder / "out.jsonl") == 0
    assert [Path(image).name for image in decoded if isinstance(image, str)] == ["0.png", "1.png"]
    assert len(encoded) == 2
    assert [row["question"] for row in rows_of(folder / "out.jsonl")] == [row["question"] for row in rows]


def test_an_unexpected_error_ends_the_run_and_keeps_the_rows_before_it(chat, questions, folder, monkeypatch):
    def fail(image):
        if image == questions[1].path:
            raise RuntimeError("CUDA out of memory")
        return preprocess(image)

    preprocess = chat.preprocess_image
    monkeypatch.setattr(chat, "preprocess_image", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(chat, questions, folder / "out.jsonl")
    assert len(rows_of(folder / "out.jsonl")) == 1


def test_an_error_of_the_model_is_raised_and_not_logged(chat, questions, folder, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(chat.model, "encode_img", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(chat, questions, folder / "out.jsonl")
    assert not caplog.records


@pytest.mark.parametrize(("pattern", "count", "status"), [("a*.jpg", 1, 1), ("*.[jp]*g", 4, 0)])
def test_the_exit_status_is_1_if_all_rows_have_an_error(chat, folder, monkeypatch, capsys, pattern, count, status):
    (folder / "a.jpg").write_bytes(b"this is no image")
    out = ["--batch", f"{folder}/{pattern}", "--out", f"{folder}/out.jsonl"]
    options = ["--greedy", "--max-new-tokens", "2", "--options", "model.ckpt=null"]
    command = ["demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", *out, *options]
    monkeypatch.setattr(sys, "argv", command)
    for build_chat in (lambda args: chat, None):  # where nothing is left to answer, no model is loaded
        monkeypatch.setattr(demo, "build_chat", build_chat)
        try:
            demo.main()
            ended = 0
        except SystemExit as error:
            ended = error.code
        assert ended == status and f"{count} rows in {folder}/out.jsonl, 1 of them with" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--seed", "7"])
    with pytest.raises(SystemExit, match="--seed was 42 and is 7"):
        demo.main()

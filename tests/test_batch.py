"""Describing many images: what is found, rows in order, resume, and lists that nobody hopes for."""

import contextlib
import io
import json
import os
import resource
import shutil
import threading
from contextlib import closing
from functools import partial

import picture_kinds
import pytest
import torch
from confined import told
from PIL import Image
from serving import GREEDY, rows_of

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation import conversation
from minigpt4.conversation.answer_batch import AnswerBatch
from minigpt4.serve.batch import answer_questions, find_questions
from minigpt4.serve.batch_output import BatchOutput
from minigpt4.serve.tables import read_rows

PNG = picture_kinds.saved(Image.new("RGB", (8, 8)), "PNG")


def answer(chat, questions, out, batch_size=16, **settings):
    """The number of rows with an error."""
    with closing(BatchOutput(out, [question.row for question in questions], settings)) as output:
        return answer_questions(chat, questions, output, GREEDY, batch_size)


def write_rows(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_rows_in_order_and_resume(chat, scene_folder, tmp_path):
    questions = find_questions(str(scene_folder), "What is it?")
    assert [q.path.rsplit("/", 1)[1] for q in questions] == ["0.png", "1.png", "2.png", "2a.jpg", "3.png", "4.png"]
    out = tmp_path / "out" / "rows.jsonl"
    assert answer(chat, questions, out, batch_size=2) == 1
    whole = out.read_bytes()
    rows = rows_of(out)
    assert [row["image"] for row in rows] == [q.path for q in questions]
    assert "2a.jpg" in rows[3]["error"] and all("answer" in row for row in rows if row is not rows[3])
    lines = whole.splitlines(keepends=True)
    for rest in (b"".join(lines[:2]), b"".join(lines[:2]) + lines[2][:20], whole):  # killed between, within, after
        out.write_bytes(rest)
        assert answer(chat, questions, out, batch_size=2) == 1
        assert out.read_bytes() == whole
    with pytest.raises(UserError, match="other images or questions"):
        answer(chat, find_questions(str(scene_folder), "Why?"), out)
    assert out.read_bytes() == whole


def test_batches_do_not_depend_on_how_fast_images_are_read(chat, scene_folder, tmp_path, monkeypatch):
    rows = [{"image": f"{scene_folder}/{i}.png", "question": f"What is {i}?"} for i in range(5)]
    questions, traces = find_questions(write_rows(tmp_path / "rows.jsonl", *rows), ""), []
    preprocess, add, step = chat.preprocess_image, AnswerBatch.add, AnswerBatch.step
    for slowest in ("0.png", "3.png"):
        trace, others = [], threading.Semaphore(0)

        def read(path, slowest=slowest, others=others):
            if isinstance(path, str) and path.endswith(slowest):
                others.acquire()  # another image is read first
            image = preprocess(path)
            others.release()
            return image

        def added(batch, conv, *args, trace=trace):
            trace.append(next(i for i in "01234" if f"What is {i}?" in conv.get_prompt()))
            return add(batch, conv, *args)

        def stepped(batch, trace=trace):
            trace.append("step")
            return step(batch)

        monkeypatch.setattr(chat, "preprocess_image", read)
        monkeypatch.setattr(AnswerBatch, "add", added)
        monkeypatch.setattr(AnswerBatch, "step", stepped)
        answer(chat, questions, tmp_path / f"{slowest}.jsonl", batch_size=3)
        traces.append(trace)
    assert traces[0] == traces[1] and traces[0][:4] == ["0", "1", "2", "step"]


def test_answers_do_not_use_what_was_prefilled_before(chat, scene_folder, tmp_path, monkeypatch):
    questions, prefilled, step = find_questions(str(scene_folder), "What is it?"), [], AnswerBatch.step

    def stepped(batch):
        answers = step(batch)
        prefilled.extend(answer.cached_tokens for answer in answers)
        return answers

    monkeypatch.setattr(AnswerBatch, "step", stepped)
    for name in ("first", "second"):
        answer(chat, questions, tmp_path / f"{name}.jsonl")
        assert len(chat.prefixes)
    assert prefilled and not any(prefilled)


def test_only_the_engine_computes_with_several_threads(chat, scene_folder, tmp_path, monkeypatch):
    """Idle threads of others, such as those that read images, would slow down its own."""
    number, found = torch.get_num_threads(), {"read": set(), "encode": set()}

    def watched(name, function, argument):
        found[name].add(torch.get_num_threads())
        return function(argument)

    monkeypatch.setattr(conversation, "read_image", partial(watched, "read", conversation.read_image))
    monkeypatch.setattr(chat, "encode_img", partial(watched, "encode", chat.encode_img))
    devices.set_threads(3)
    try:
        answer(chat, find_questions(str(scene_folder), "What is it?"), tmp_path / "rows.jsonl", batch_size=2)
        assert found == {"read": {1}, "encode": {3}} and torch.get_num_threads() == 3
    finally:
        devices.set_threads(number)


def test_images_of_every_kind(chat, image_kinds, tmp_path):
    good, bad = image_kinds
    questions = find_questions(str(good[0].parent), "What?")
    assert answer(chat, questions, tmp_path / "out.jsonl") == len(bad)
    for row in rows_of(tmp_path / "out.jsonl"):
        name = row["image"].rsplit("/", 1)[1]
        assert "answer" in row if name in {file.name for file in good} else name in row["error"]


def test_a_question_that_is_too_long_is_a_row(chat, scene_folder, tmp_path):
    rows = [{"image": f"{scene_folder}/0.png", "question": text} for text in ("Why?", "x" * 100_000, "")]
    questions = find_questions(write_rows(tmp_path / "rows.jsonl", *rows), "What?")
    assert answer(chat, questions, tmp_path / "out.jsonl") == 2
    first, second, third = rows_of(tmp_path / "out.jsonl")
    assert first["answer"] and "too long" in second["error"] and "empty" in third["error"]


def test_resume_after_odd_line_ends_and_a_bad_target(chat, scene_folder, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"image": f"{scene_folder}/0.png", "question": "Why\u2028so\x85?"}
    rows.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    for _ in range(2):
        assert answer(chat, find_questions(str(rows), "What?"), out) == 0
        assert out.read_text(encoding="utf-8").count("\n") == 1
    with pytest.raises(UserError, match=r"--out.*cannot be written"):
        (tmp_path / "folder.jsonl").mkdir()
        answer(chat, find_questions(str(rows), "What?"), tmp_path / "folder.jsonl")


@pytest.fixture
def questions(scene_folder):
    return find_questions(f"{scene_folder}/[0-4].png", "What?")


def at_third_row(monkeypatch, action):
    """Runs ``action`` before the third row is written."""
    append = BatchOutput.append

    def hooked(output, rows):
        for row in rows:
            if len(output) == 2:
                action()
            append(output, [row])

    monkeypatch.setattr(BatchOutput, "append", hooked)


@pytest.mark.parametrize("vanished", ["file", "folder"])
def test_a_target_that_vanishes_is_written_again(chat, questions, tmp_path, monkeypatch, vanished):
    out = tmp_path / "out" / "rows.jsonl"
    at_third_row(monkeypatch, out.unlink if vanished == "file" else lambda: shutil.rmtree(out.parent))
    assert answer(chat, questions, out, batch_size=1) == 0
    assert [row["image"] for row in rows_of(out)] == [question.path for question in questions]


def test_a_target_that_becomes_unwritable_is_reported(chat, questions, tmp_path, monkeypatch):
    out = tmp_path / "out" / "rows.jsonl"

    def replace_folder():
        shutil.rmtree(out.parent)
        out.parent.write_text("")

    at_third_row(monkeypatch, replace_folder)
    message = told(lambda: answer(chat, questions, out, batch_size=1), "--out", "cannot be written")
    assert "are kept" not in message


def test_a_target_that_another_program_writes_is_reported(chat, questions, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    at_third_row(monkeypatch, lambda: out.open("a").write("{}\n"))
    told(lambda: answer(chat, questions, out, batch_size=1), "another program", "2 rows are kept")
    assert len(rows_of(out)) == 3


def test_a_full_disk_keeps_the_finished_rows(chat, questions, tmp_path):
    """A limit on the size of files replaces a full disk: with both, a write fails half way with an OSError."""
    out, (reader, writer) = tmp_path / "rows.jsonl", os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.redirect_stderr(io.StringIO()):  # pytest's file would be limited, too
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
                answer(chat, questions, out, batch_size=2)
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        message = pipe.read()
    os.waitpid(pid, 0)
    rows = rows_of(out)
    assert message.startswith("UserError: --out: ") and f"its {len(rows)} rows are kept" in message
    assert 0 < len(rows) < 5 and out.read_bytes().endswith(b"\n")
    assert answer(chat, questions, out, batch_size=2) == 0 and len(rows_of(out)) == 5


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.jsonl", "pipe.jsonl", "device.jsonl", "file/rows.jsonl"])
def test_a_target_that_cannot_be_written_is_reported_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink("/dev/full", tmp_path / "device.jsonl")
    (tmp_path / "file").write_text("")
    told(lambda: BatchOutput(tmp_path / name, [], {}), "--out", "cannot be written", "give another file")


@pytest.mark.parametrize("name", ["rows.tsv", "rows.json", "rows"])
def test_a_target_with_another_extension_is_refused(tmp_path, name):
    told(lambda: BatchOutput(tmp_path / name, [], {}), "--out", name, "neither .jsonl nor .csv nor .parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", ""), ("rows.jsonl", "\n"), ("rows.csv", "image\n")])
def test_a_source_without_rows_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    told(lambda: find_questions(str(tmp_path / name), "Why?"), "--batch", name, "has no rows")


def test_sources(scene_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png", "question": "Why?"}\n\n{"image": "b.png"}\n', encoding="utf-8")
    assert [(q.path, q.text) for q in find_questions(str(rows), "What?")] == [
        (str(tmp_path / "a.png"), "Why?"),
        (str(tmp_path / "b.png"), "What?"),
    ]
    assert len(find_questions(f"{scene_folder}/[0-2].png", "What?")) == 3
    with pytest.raises(UserError, match="holds no images"):
        find_questions(str(tmp_path / "nothing"), "What?")


MALFORMED_ROWS = {
    "no JSON": (b"a.png\n", "line 1", "JSON"),
    "half an object": (b"{", "line 1", "JSON"),
    "deep": (b"[" * 10**6, "line 1", "JSON"),
    "5000 digits": (b'{"image": ' + b"9" * 5000 + b"}", "line 1", "JSON"),
    "not UTF-8": (b'{"image": "\xff.png"}', "UTF-8"),
    "null": (b"null", "line 1"),
    "a list": (b'["image"]', "line 1"),
    "no image": (b'{"question": "Why?"}', "line 1"),
    "an image as a number": (b'{"image": 5}', "line 1"),
    "the second row": (b'{"image": "a.png"}\n{"image": null}', "line 2"),
}


@pytest.mark.parametrize("case", MALFORMED_ROWS)
def test_malformed_rows(tmp_path, case, confined):
    data, *words = MALFORMED_ROWS[case]
    (tmp_path / "rows.jsonl").write_bytes(data)
    told(lambda: find_questions(str(tmp_path / "rows.jsonl"), "What?"), "--batch", "rows.jsonl", *words)


def test_rows_that_are_answered_with_an_error(chat, tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    images = ["good.png", "absent.png", "a\0b.png", "\ud800.png", "x" * 5000, "pipe.png", "zero.png", "", "/etc/passwd"]
    rows = [{"image": image, "question": "Why?"} for image in images]
    questions = ["<ImageHere>", "", "\u2028", "half \ud83d", None, ["a"]]
    rows += [{"image": "good.png", "question": question} for question in questions]
    found = find_questions(write_rows(tmp_path / "rows.jsonl", *rows), "What?")
    out = tmp_path / "out.jsonl"
    assert answer(chat, found, out) == 11
    lines = out.read_text(encoding="utf-8").split("\n")[:-1]
    assert ["error" in json.loads(line) for line in lines] == [False] + [True] * 11 + [False] * 3
    whole = out.read_bytes()
    assert answer(chat, found, out) == 11 and out.read_bytes() == whole  # recognises its own rows


def test_names_that_are_not_utf_8(chat, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(PNG)
    out = tmp_path / "out.jsonl"
    found = find_questions(str(tmp_path), "What?")
    for _ in range(2):
        assert answer(chat, found, out) == 0
        row = json.loads(out.read_text(encoding="utf-8"))
        assert row["image"] == os.fsdecode(name) and row["answer"] is not None


FOREIGN_TARGETS = {
    "null": b"null\n",
    "deep": b"[" * 100_000 + b"\n",
    "not UTF-8": b"\xff\n",
    "a number": b"5\n",
    "no question": b'{"image": 5}\n',
    "a list": b'[{"image": "a", "question": "b"}]\n',
    "nothing": b"{}\n",
}


@pytest.mark.parametrize("case", FOREIGN_TARGETS)
def test_a_target_with_other_rows_is_left_unchanged(chat, tmp_path, case):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "out.jsonl").write_bytes(FOREIGN_TARGETS[case])
    found = find_questions(str(tmp_path), "What?")
    told(lambda: answer(chat, found, tmp_path / "out.jsonl"), "--out", "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == FOREIGN_TARGETS[case]
    assert sorted(os.listdir(tmp_path)) == ["a.png", "out.jsonl"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_boxes_of_minigpt_v2(chat, scene_folder, tmp_path, monkeypatch, name):
    boxes = [{"phrase": "a ring", "box": [0.05, 0.3, 0.4, 0.6]}, {"phrase": "a dot", "box": [0.5, 0.5, 0.7, 1.0]}]
    text = "<p>a ring</p> {<5><30><40><60>}, <p>a dot</p> {<50><50><70><100>}, <p>no</p> {<120><0><130><9>}"
    monkeypatch.setattr(chat.model, "arch", "minigpt_v2")
    monkeypatch.setattr(chat, "decode_answer", lambda *_, **__: text)
    path = str(scene_folder / "0.png")
    rows = [{"image": path, "boxes": 3}, {"image": path, "boxes": 4, "question": "[identify] {<120><0><130><9>}"}]
    questions = find_questions(write_rows(tmp_path / "in.jsonl", *rows), "[grounding]")
    assert answer(chat, questions, tmp_path / name) == 1
    good, bad = [row for _, row in read_rows(tmp_path / name, "")]
    assert (json.loads(good["boxes"]) if name == "out.csv" else good["boxes"]) == boxes and good["answer"] == text
    assert "[120, 0, 130, 9] lies outside the image" in bad["error"] and not bad.get("boxes")
    assert int(good["input_boxes"]) == 3

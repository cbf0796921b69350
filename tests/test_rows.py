"""Rows of known projects: what they mean, and which are refused before the training."""

import json

import pytest
from confined import told
from data_samples import KEY

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.conversations import DataUrl, Dialogue, Pair
from minigpt4.datasets.datasets.pairs import read_pairs
from minigpt4.datasets.datasets.rows import Location, read_row

A, B, HERE = "a.jpg", "b.jpg", "<ImageHere>"
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A dog. "}]
MORE = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
ASKED = (f"{HERE}\nWhat?", "A dog.")
URL = "data:image/jpeg;base64,AAAA"
PARTS = [{"type": "image_url", "image_url": {"url": A}}, {"type": "text", "text": "What?"}]


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


FORMS = {  # a row, the names of its images, its turns, its system text
    "LLaVA": ({"id": "1", "image": A, "conversations": TURNS + MORE}, [A], [ASKED, ("Sure?", "Yes.")], ""),
    "LLaVA, text only": ({"conversations": MORE}, [], [("Sure?", "Yes.")], ""),
    "LLaVA, image at the end": (
        {"image": A, "conversations": [{"from": "human", "value": "What?\n<image>"}, TURNS[1]]},
        [A], [(f"What?\n{HERE}", "A dog.")], "",
    ),
    "several images": (
        {"image": [A, B], "conversations": [{"from": "human", "value": "<image> or <image>?"}, TURNS[1]]},
        [A, B], [(f"{HERE} or {HERE}?", "A dog.")], "",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *MORE]}, [], [("Sure?", "Yes.")], "Be brief.",
    ),
    "LLaMA-Factory, sharegpt": ({"images": [A], "system": "S", "conversations": TURNS}, [A], [ASKED], "S"),
    "LLaMA-Factory, messages": (
        {"images": [A], "messages": said("<image>\nWhat?", "A dog.")},
        [A], [ASKED], "",
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "<image>\nWhat?", "input": "Look.", "output": "A dog.", "images": [A],
         "history": [["Hi", "Ho"]]},
        [A], [("Hi", "Ho"), (f"{HERE}\nWhat?\nLook.", "A dog.")], "",
    ),
    "lists of roles and of texts": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Sure?", "Yes."]}}, [], [("Sure?", "Yes.")], "",
    ),
    "text only, with an empty image": ({"image": "", "conversations": MORE}, [], [("Sure?", "Yes.")], ""),
    "the image in this project's tags": (
        {"image": A, "conversations": [{"from": "human", "value": f"<Img>{HERE}</Img> What?"}, TURNS[1]]},
        [A], [(f"{HERE} What?", "A dog.")], "",
    ),
    "OpenAI, developer": (
        {"messages": [{"role": "developer", "content": "S"}, *said("Sure?", "Yes.")]}, [], [("Sure?", "Yes.")], "S",
    ),
    "OpenAI": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A dog."}]},
        [A], [(f"{HERE} What?", "A dog.")], "",
    ),
    "OpenAI, several texts": (
        {"messages": said([{"type": "text", "text": "Sure?"}, {"type": "text", "text": "Why?"}], "Yes.")},
        [], [("Sure? Why?", "Yes.")], "",
    ),
    "OpenAI, data URL": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]},
        [URL], [(HERE, "A dog.")], "",
    ),
}  # fmt: skip


def as_json(rows):
    return json.dumps(rows, indent=1)


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("file", "write"), [("x.json", as_json), ("x.jsonl", as_jsonl), ("lines.json", as_jsonl)])
def test_forms(tmp_path, name, file, write):
    row, images, turns, system = FORMS[name]
    (tmp_path / file).write_text(write([row, row]))
    sources = tuple(DataUrl(image) if image.startswith("data:") else tmp_path / image for image in images)
    expected = Dialogue(sources, tuple(turns), system)
    assert read_pairs(tmp_path / file, KEY) == read_pairs(tmp_path, KEY) == [expected] * 2
    elsewhere = read_pairs(tmp_path / file, KEY, tmp_path / "root")[0]
    assert [str(image) for image in elsewhere.images if "data" not in str(image)] == [
        str(tmp_path / "root" / image) for image in images if image != URL
    ]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


INVALID = {
    "two questions in a row": ({"conversations": [TURNS[0], TURNS[0]]}, "text 2 by the user", "the assistant"),
    "an answer first": ({"conversations": MORE[::-1]}, "text 1 by the assistant", "expected the user"),
    "no last answer": ({"conversations": TURNS + MORE[:1], "image": A}, "ends with a question"),
    "a placeholder without image": ({"conversations": TURNS}, "has 0 images and 1 times <image>"),
    "an image without placeholder": ({"image": A, "conversations": MORE}, "has 1 images and 0 times <image>"),
    "an image in an answer": ({"image": A, "conversations": turns("What?", "<image>")}, "in the answer '<image>'"),
    "an empty answer": ({"conversations": turns("What?", " ")}, "answer ' ' as text 2"),
    "an empty question": ({"conversations": turns("", "a")}, "question '' as text 1"),
    "an answer that is none": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
                               "turn 2 with None"),
    "ten thousand turns": ({"conversations": turns(*["a"] * 10_000)}, "10,000 turns", "at most 2,000"),
    "no turns": ({"conversations": []}, "no turns in conversations"),
    "turns as a text": ({"messages": "What?"}, "type str", "a list of turns"),
    "an unknown role": ({"conversations": [{"from": "tool", "value": "a"}]}, "role 'tool' in turn 1", "human, user"),
    "an unknown turn": ({"conversations": [{"text": "a"}]}, "turn 1 {'text': 'a'}", "from and value"),
    "a late system text": ({"conversations": [*MORE, {"from": "system", "value": "a"}]}, "system text in turn 3"),
    "an unknown part": ({"messages": said([{"type": "input_audio"}])}, "input_audio", "turn 1"),
    "an image in the system text": (
        {"messages": [{"role": "system", "content": HERE}, *said("a", "b")]}, "image in the system text",
    ),
    "an answer that is not to be trained": (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 0}]}, "weight 0 in turn 2",
    ),
    "a video": ({"video": "a.mp4", "conversations": turns("<video>", "a")}, "has the key video"),
    "an image elsewhere": ({"image": "https://host/a.jpg", "conversations": TURNS}, "https://host/a", "download it"),
    "an image as a number": ({"image": 5, "conversations": TURNS}, "has the image 5"),
    "alpaca without output": ({"instruction": "a", "output": None}, "answer None"),
    "a history of one": ({"instruction": "a", "output": "b", "history": [["a"]]}, "['a'] in its history"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid_rows_are_told_before_the_training(tmp_path, name):
    row, *words = INVALID[name]
    file = tmp_path / "x.jsonl"
    file.write_text(as_jsonl([{"image": A, "conversations": TURNS}, row]))
    told(lambda: read_pairs(file, KEY), KEY, f"line 2 of {file}", *words)
    (tmp_path / "y.json").write_text(as_json([row]))
    told(lambda: read_pairs(tmp_path / "y.json", KEY), KEY, f"row 1 of {tmp_path / 'y.json'}", *words)


def changed(value, replacement):
    """Copies of a JSON value in each of which one part is replaced."""
    yield replacement
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield from ([*value[:i], new, *value[i + 1 :]] for new in changed(part, replacement))
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: new} for new in changed(part, replacement))


@pytest.mark.parametrize(
    "replacement", [None, 5, True, [], {}, "", [[]], [{}], "<image>", "file://[", "data:,", "a\0b"]
)
def test_damaged_rows_are_read_or_told(tmp_path, replacement):
    where, read = Location("row 1 of x", tmp_path), 0
    for row, *_ in FORMS.values():
        for damaged in changed(row, replacement):
            try:
                read += isinstance(read_row(damaged, where), Pair | Dialogue)
            except UserError as error:
                assert str(error).startswith("row 1 of x ")
    assert read > 0 or replacement in ([], {})

"""Lists of pairs that somebody prepared: what is good is read, the rest is counted or refused."""

import json
from collections import Counter

import pytest
from confined import told
from data_samples import EVAL, KEY, make_loader, texts
from hostile_data import PICTURE

from minigpt4.datasets.datasets import PairDataset
from minigpt4.datasets.datasets.pairs import Pair, read_align_folder, read_pairs
from minigpt4.datasets.loader import eval_batches

pytestmark = pytest.mark.usefixtures("confined")


def read_pairs_once(pairs):
    """Captions of the samples of pairs, and what was counted."""
    batches = eval_batches("x", PairDataset("x", pairs, EVAL), batch_size=3, num_workers=0, seed=0)
    return texts(batches), batches.skipped


# filter_cap.json


def annotations(*entries):
    return json.dumps({"annotations": entries}).encode()


ALIGN = {
    "no bytes": (b"", "JSON"),
    "null": (b"null", "annotations"),
    "a number": (b"5", "annotations"),
    "a text": (b'"a"', "annotations"),
    "a list in place of the dict": (b'[{"image_id": "1", "caption": "a"}]', "annotations"),
    "no annotations": (b"{}", "annotations"),
    "annotations as null": (b'{"annotations": null}', "annotations"),
    "annotations as a dict": (b'{"annotations": {"image_id": "1", "caption": "a"}}', "annotations"),
    "annotations as a text": (b'{"annotations": "a"}', "annotations"),
    "none of them": (b'{"annotations": []}', "annotations"),
    "cut": (b'{"annotations": [{"image_id": "1"', "JSON"),
    "not UTF-8": (b'{"annotations": [{"image_id": "1", "caption": "\xe9"}]}', "JSON", "0xe9 in line 1"),
    "deep": (b"[" * 10**6, "JSON"),
    "deep annotation": (b'{"annotations": [' + b"[" * 10**5 + b"]" * 10**5 + b"]}", "JSON"),
    "5000 digits": (b'{"annotations": ' + b"9" * 5000 + b"}", "JSON", "digits"),
    "an entry as null": (annotations(None), "annotation 0", "image_id"),
    "an entry as a list": (annotations({"image_id": "1", "caption": "a"}, ["2", "b"]), "annotation 1", "['2', 'b']"),
    "an entry as a text": (annotations("image_id caption"), "annotation 0"),
    "no image_id": (annotations({"caption": "a"}), "annotation 0", "image_id"),
    "no caption": (annotations({"image_id": "1"}), "annotation 0", "caption"),
    "an id that leads up": (annotations({"image_id": "../1", "caption": "a"}), "'../1'", "image/"),
    "an absolute id": (annotations({"image_id": "/etc/passwd", "caption": "a"}), "'/etc/passwd'"),
    "an id of Windows": (annotations({"image_id": "..\\1", "caption": "a"}), "'..\\1'"),
    "an empty id": (annotations({"image_id": "", "caption": "a"}), "''"),
    "dots as an id": (annotations({"image_id": "..", "caption": "a"}), "'..'"),
    "an id of a megabyte": (annotations({"image_id": "../" + "x" * 10**6, "caption": "a"}), "'../xxx"),
    "a line end in an id": (annotations({"image_id": "a/\nb", "caption": "a"}), "'a/ b'"),
    "an entry of a megabyte": (annotations({"caption": "a" * 10**6}), "annotation 0", "aaa"),
}
SKIPPED_PAIRS = {  # entries of which one sample beside a good one comes out
    "an unknown id": ({"image_id": "nothing", "caption": "a"}, "missing image file"),
    "a number as an id": ({"image_id": 17, "caption": "a"}, "missing image file"),
    "null as an id": ({"image_id": None, "caption": "a"}, "missing image file"),
    "a list as an id": ({"image_id": [1], "caption": "a"}, "missing image file"),
    "a zero byte in an id": ({"image_id": "a\0b", "caption": "a"}, "missing image file"),
    "half a surrogate pair in an id": ({"image_id": "\ud800", "caption": "a"}, "missing image file"),
    "an id of 10,000 letters": ({"image_id": "a" * 10_000, "caption": "a"}, "missing image file"),
    "null as a caption": ({"image_id": "1", "caption": None}, "no caption"),
    "a number as a caption": ({"image_id": "1", "caption": 1.5}, "no caption"),
    "a list as a caption": ({"image_id": "1", "caption": ["a"]}, "no caption"),
    "a dict as a caption": ({"image_id": "1", "caption": {}}, "no caption"),
    "an empty caption": ({"image_id": "1", "caption": " \n"}, "no caption"),
    "a caption of 10 MB": ({"image_id": "1", "caption": "a" * 10**7}, "caption too long"),
}


@pytest.mark.parametrize("case", ALIGN)
def test_filter_cap(tmp_path, case):
    content, *words = ALIGN[case]
    (tmp_path / "filter_cap.json").write_bytes(content)
    told(lambda: read_align_folder(tmp_path, KEY), KEY, str(tmp_path / "filter_cap.json"), *words)


@pytest.mark.parametrize("case", SKIPPED_PAIRS)
def test_pair(tmp_path, case):
    entry, kind = SKIPPED_PAIRS[case]
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "filter_cap.json").write_bytes(annotations({"image_id": "1", "caption": "good"}, entry))
    found = read_align_folder(tmp_path, KEY)
    assert read_pairs_once(found) == (["good"], {kind: 1})
    assert texts(make_loader({"x": PairDataset("x", found, EVAL)}, iters_per_epoch=4).iter_epoch(0)) == ["good"] * 8


def test_a_picture_may_have_two_captions(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "filter_cap.json").write_bytes(annotations(*[{"image_id": "1", "caption": c} for c in "aab"]))
    assert Counter(read_pairs_once(read_align_folder(tmp_path, KEY))[0]) == {"a": 2, "b": 1}


# one's own pictures

ROW = '{"image": "a.jpg", "caption": "a"}'
LISTS = {
    "no bytes": (b"", "empty"),
    "blank lines": (b"\n \n\r\n", "empty"),
    "no JSON": (b"a.jpg,a dog", "begins with 'a.jpg,a dog'", "JSON, or CSV"),
    "one JSON of all rows, cut off": (f"[{ROW},\n{ROW}".encode(), "JSON"),
    "a list as a row": (b'["a.jpg", "a"]', "row 1", "image and caption"),
    "null as a row": (f"{ROW}\nnull".encode(), "line 2"),
    "a text as a row": (b'"image caption"', "begins with"),
    "YAML": (b"- image: a.jpg\n  caption: a", "begins with '- image: a.jpg'"),
    "XML": (b"<annotations/>", "begins with '<annotations/>'"),
    "other columns": (b"path,label\na.jpg,a", "begins with 'path,label'", "column of images (image, "),
    "an object over several lines": (b'{\n "data": []\n}', "line 1", "{'data': []}"),
    "no image": (b'{"caption": "a"}', "line 1"),
    "no caption": (b'{"image": "a.jpg"}', "line 1"),
    "an image as a number": (b'{"image": 5, "caption": "a"}', "line 1"),
    "an image as null": (b'{"image": null, "caption": "a"}', "line 1"),
    "a caption as null": (b'{"image": "a.jpg", "caption": null}', "line 1"),
    "a caption as a list": (b'{"image": "a.jpg", "caption": ["a"]}', "line 1"),
    "a row cut off": (f"{ROW}\n{ROW[:-5]}".encode(), "line 2", "JSON"),
    "not UTF-8": (b'{"image": "a.jpg", "caption": "caf\xe9"}', "0xe9 in line 1", "UTF-8"),
    "not UTF-8 in line 2": (f"{ROW}\n".encode() + b'{"image": "caf\xe9"}', "0xe9 in line 2", "UTF-8"),
    "UTF-16": (f"{ROW}\n{ROW}".encode("utf-16"), "UTF-8"),
    "deep": (b"[" * 10**6, "JSON"),
    "zeros": (b"\0" * 1000, "begins with", "JSON"),
    "an instruction as a number": (b'{"image": "a", "caption": "a", "instruction": 5}', "line 1", "instruction", "5"),
    "an instruction as a list": (b'{"image": "a", "caption": "a", "instruction": ["b"]}', "line 1", "['b']"),
    "an instruction with an image": (
        b'{"image": "a", "caption": "a", "instruction": "<Img><ImageHere></Img> b"}',
        "line 1",
        "without <ImageHere>",
    ),
    "an instruction of a megabyte": (
        json.dumps({"image": "a", "caption": "a", "instruction": ["b" * 10**6]}).encode(),
        "line 1",
        "bbb",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_list_of_ones_own(tmp_path, case):
    content, *words = LISTS[case]
    (tmp_path / "own.jsonl").write_bytes(content)
    told(lambda: read_pairs(tmp_path / "own.jsonl", KEY), KEY, str(tmp_path / "own.jsonl"), *words)


@pytest.mark.parametrize(
    "image", ["absent.jpg", "../absent.jpg", "a\0b.jpg", "\ud800.jpg", "x" * 10_000, "", ".", "/dev/zero"]
)
def test_image_of_ones_own_that_is_none(tmp_path, image):
    rows = [json.dumps({"image": name, "caption": name or "a"}) for name in ("good.jpg", image)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "good.jpg").write_bytes(PICTURE)
    assert read_pairs_once(read_pairs(tmp_path, KEY)) == (["good.jpg"], {"missing image file": 1})


def test_nothing_but_bad_pairs_ends_the_run_with_a_line(tmp_path):
    dataset = PairDataset("mine", [Pair(tmp_path / "a\0b.jpg", "a")], EVAL)
    told(lambda: texts(make_loader({"mine": dataset}).iter_epoch(0)), "mine", "missing image file")

"""Listed pairs: cc_sbu_align folders and own pictures, what is read and what is refused."""

import json

import pytest
import torch
from data_samples import EVAL, KEY, captions, make_loader, picture, texts
from PIL import Image

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets import PairDataset
from minigpt4.datasets.datasets.pairs import Pair, read_align_folder, read_pairs
from minigpt4.datasets.loader import LOADER_KEY, eval_batches


def test_pairs_by_index(pairs):
    dataset = PairDataset("x", pairs, EVAL, str.upper)
    assert len(dataset) == 24 and captions(dataset[i] for i in range(24)) == [f"C{n}" for n in range(24)]
    assert torch.equal(dataset[3]["image"], EVAL(Image.open(pairs[3].image)))


def test_pairs_that_cannot_be_used_are_replaced(pairs):
    pairs[3].image.write_bytes(b"no image")
    pairs[4].image.unlink()
    pairs[5] = Pair(pairs[5].image, " ")
    dataset = PairDataset("x", pairs, EVAL)
    (whole_pass,) = make_loader({"x": dataset}, batch_size=24, iters_per_epoch=1).iter_epoch(0)
    assert not {"c3", "c4", "c5"} & set(whole_pass["text_input"]) and len(set(whole_pass["text_input"])) == 21
    assert set(whole_pass[LOADER_KEY]["skipped"]) == {"unreadable image", "missing image file", "no caption"}
    batches = eval_batches("x", dataset, batch_size=5, num_workers=0, seed=0)
    assert len(texts(batches)) == 21
    assert batches.skipped == {"unreadable image": 1, "missing image file": 1, "no caption": 1}


def test_pairs_without_a_usable_one(tmp_path):
    dataset = PairDataset("mine", [Pair(tmp_path / "no.jpg", "c")], EVAL)
    with pytest.raises(UserError) as error:
        next(make_loader({"mine": dataset}).iter_epoch(0))
    assert all(word in str(error.value) for word in ("mine", "1000", "missing image file", "no.jpg"))


def test_align_folder(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "2.jpg").write_bytes(picture(1))
    content = {"annotations": [{"image_id": "2", "caption": "A dog. It sits!"}, {"image_id": 7, "caption": "b"}]}
    (tmp_path / "filter_cap.json").write_text(json.dumps(content))
    folder = tmp_path / "image"
    assert read_align_folder(tmp_path, KEY) == [Pair(folder / "2.jpg", "A dog. It sits!"), Pair(folder / "7.jpg", "b")]
    sizes = {"train": {"name": "blip2_image_eval", "image_size": 8}}
    config = {"build_info": {"storage": str(tmp_path)}, "vis_processor": sizes}
    dataset = registry.get_builder_class("cc_sbu_align")(config, "cc_sbu_align").build_datasets()["train"]
    sample = dataset[0]
    assert sample["text_input"] == "A dog. It sits!"  # as it is: no caption processor here
    assert sample["image"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "filter_cap.json"),
        ("{", "JSON"),
        ("[]", "annotations"),
        ('{"annotations": []}', "annotations"),
        ('{"annotations": [{"image_id": "1"}]}', "caption"),
        ('{"annotations": [{"image_id": "../1", "caption": "a"}]}', "../1"),
    ],
)
def test_bad_align_folder(tmp_path, content, words):
    if content is not None:
        (tmp_path / "filter_cap.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_align_folder(tmp_path, KEY)
    assert KEY in str(error.value) and words in str(error.value)


def test_jsonl(tmp_path):
    rows = [{"image": "a.jpg", "caption": "a"}, {"image": "sub/b.png", "caption": "b", "instruction": "What?"}]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    expected = [Pair(tmp_path / "a.jpg", "a"), Pair(tmp_path / "sub" / "b.png", "b", "What?")]
    assert read_pairs(file, KEY) == read_pairs(tmp_path, KEY) == expected
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes(picture(1, "PNG"))
    assert PairDataset("x", expected, EVAL)[1]["instruction"] == "What?"


def test_folder_of_images_with_texts(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "no_text.jpg"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a", "b", "deep/c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\n")
    found = {pair.image.name: pair.caption for pair in read_pairs(tmp_path, KEY)}
    assert found == {"a.jpg": "text of a", "b.PNG": "text of b", "c.webp": "text of deep/c"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ("0 images",)),
        ({"a.jpg": "x"}, ("1 images", ".txt")),
        ({"a.jsonl": "", "b.jsonl": ""}, ("a.jsonl, b.jsonl",)),
        ({"a.jsonl": ""}, ("empty",)),
        ({"a.jsonl": '{"image": "x"}'}, ("line 1", "caption")),
        ({"a.jsonl": '{"image": "x", "caption": "c"}\n{'}, ("line 2", "JSON")),
        ({"a.jsonl": '{"image": "x", "caption": "c", "instruction": 5}'}, ("line 1", "instruction", "5")),
    ],
    ids=range(7),
)
def test_bad_folder_of_ones_own(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path, KEY)
    assert all(word in str(error.value) for word in (KEY, *words))

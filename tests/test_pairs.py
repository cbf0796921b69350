"""Listed pairs: cc_sbu_align folders and own pictures, what is read and what is refused."""

import json

import pytest
import torch
from data_samples import EVAL, KEY, captions, make_loader, picture, texts
from PIL import Image

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets import PairDataset
from minigpt4.datasets.datasets.pairs import Pair, check_images, read_align_folder, read_pairs
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


@pytest.fixture
def own(tmp_path):
    """A folder of own images: one with a text in it, and one in a folder that is linked twice."""
    for name, text in (("own/a.jpg", b"of a"), ("elsewhere/b.jpg", b"of b")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(1))
        (tmp_path / name).with_suffix(".txt").write_bytes(text)
    for name in ("link", "link again"):
        (tmp_path / "own" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "cycle").symlink_to(tmp_path / "own")
    return tmp_path / "own"


def test_linked_folders_are_followed_once(own):
    assert [pair.caption for pair in read_pairs(own, KEY)] == ["of a", "of b"]


def test_images_without_a_readable_text_are_counted(own, caplog):
    (own / "c.jpg").write_bytes(picture(1))
    for name, text in (("d", b"caf\xe9"), ("e", b"\xef\xbb\xbfof e"), ("f", b" ")):
        (own / f"{name}.jpg").write_bytes(picture(1))
        (own / f"{name}.txt").write_bytes(text)
    assert [pair.caption for pair in read_pairs(own, KEY)] == ["of a", "of e", "", "of b"]
    assert f"1 of 6 images have no .txt of the same name and are ignored (first: {own / 'c.jpg'})" in caplog.text
    assert f"1 texts are ignored, the first: {own / 'd.txt'} is not UTF-8 text (byte 0xe9 in line 1)" in caplog.text


ROW = '{"image": "a.jpg", "caption": "of the list"}'


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"log.jsonl": '{"step": 1}'}, ["of a", "of b"]),
        ({"log.jsonl": "no JSON"}, ["of a", "of b"]),
        ({"log.jsonl": '{"step": 1}', "own.jsonl": ROW}, ["of the list"]),
        ({"own.jsonl": f"\n{ROW}\n"}, ["of the list"]),
    ],
)
def test_jsonl_files_that_are_no_lists_are_ignored(own, caplog, lists, expected):
    for name, content in lists.items():
        (own / name).write_text(content)
    assert [pair.caption for pair in read_pairs(own, KEY)] == expected
    assert ("log.jsonl has no rows of image and caption; it is ignored" in caplog.text) == ("log.jsonl" in lists)


@pytest.mark.parametrize("mark", ["<image>", "<ImageHere>"])
def test_instructions_must_not_place_the_image(tmp_path, mark):
    (tmp_path / "own.jsonl").write_text(json.dumps({"image": "a", "caption": "b", "instruction": f"{mark}\nWhat?"}))
    with pytest.raises(UserError, match=f"line 1 of .*{mark} What.*<ImageHere> and <image>, as the image .* first"):
        read_pairs(tmp_path, KEY)


FORMATS = {
    "a.jsonl": (b"PK\3\4abc", "is a ZIP archive"),
    "b.jsonl": (b"\x89HDF\r\n", "is an HDF5 file"),
    "c.jsonl": (json.dumps({"image": "https://host/a.jpg", "caption": "a"}).encode(), "download it first"),
    "d.parquet": (b"PAR1", "cannot be read as a table"),
    "filter_cap.json": (b"{}", "belongs to the data set cc_sbu_align"),
    "f.json": (b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}', "'caption' is missing"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_other_formats_are_named(tmp_path, name, form):
    content, words = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{KEY}: .*{name}.* {words}"):
        read_pairs(tmp_path if form == "folder" else tmp_path / name, KEY)


def test_paths_of_windows(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"image": "sub\\\\a.jpg", "caption": "a"}')
    assert read_pairs(tmp_path, KEY) == [Pair(tmp_path / "sub" / "a.jpg", "a")]


def test_ids_of_align_images(tmp_path):
    (tmp_path / "image").mkdir()
    for name in ("1.png", "2.JPG", "3.jpg", "3.png", "4.webp"):
        (tmp_path / "image" / name).write_bytes(picture(1))
    ids = {"1": "1.png", 2: "2.JPG", "3": "3.jpg", "3.png": "3.png", "image\\4.webp": "4.webp", "image/1": "1.png"}
    content = {"annotations": [{"image_id": image_id, "caption": "c"} for image_id in ids]}
    (tmp_path / "filter_cap.json").write_text(json.dumps(content))
    assert [pair.image.name for pair in read_align_folder(tmp_path, KEY)] == list(ids.values())
    (tmp_path / "filter_cap.json").write_text(json.dumps(content | {"images": []}))
    with pytest.raises(UserError, match="is in the format of COCO"):
        read_align_folder(tmp_path, KEY)


@pytest.mark.parametrize("name", ["image_text", "cc_sbu_align"])
def test_storage_may_be_a_list(tmp_path, name, caplog):
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        (folder / "image").mkdir(parents=True)
        (folder / "image" / "a.jpg").write_bytes(picture(1))
        rows = [{"image_id": image, "image": f"image/{image}.jpg", "caption": folder.name} for image in "ab"]
        (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
        (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build = registry.get_builder_class(name)
    dataset = build({"build_info": {"storage": list(map(str, folders))}}, name).build_datasets()["train"]
    assert [pair.caption for pair in dataset.pairs] == ["1", "1", "2", "2"]
    assert f"2 of 4 images that were looked for are missing (first: {folders[0] / 'image' / 'b.jpg'})" in caplog.text
    (folders[0] / "image" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 2 images .* missing .* correct the paths"):
        build({"build_info": {"storage": str(folders[0])}}, name).build_datasets()


def test_long_lists_are_checked_by_a_sample(tmp_path, caplog):
    pairs = [Pair(tmp_path / f"{n}.jpg", "c") for n in range(2500)]
    with pytest.raises(UserError, match=r"834 of 834 images .* missing .*0\.jpg\); correct the paths"):
        check_images(pairs, KEY)
    pairs[0].image.write_bytes(picture(1))
    check_images(pairs, KEY)
    assert "833 of 834 images" in caplog.text

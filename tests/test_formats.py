"""Files of other programs: each format is trained for two steps; what is refused says what it is."""

import pickle

import foreign_formats
import pyarrow
import pyarrow.parquet
import pytest
import torch
from confined import told
from data_samples import make_loader

from minigpt4.common.registry import registry
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.loader import eval_batches

FORMATS = {  # number of usable samples, and a text that is trained
    "llava": (8, "A red circle.\nYes, I am."),
    "llava_jsonl": (8, "Two circles."),
    "sharegpt": (4, "4"),
    "factory_alpaca": (4, "A red circle."),
    "factory_messages": (4, "A circle."),
    "openai": (3, "A"),
    "coco": (10, "Circle 9."),
    "flickr_csv": (8, 'A "circle , number 1 .'),
    "flickr_token": (6, "A circle , number 1 ."),
    "karpathy_csv": (6, "It's round."),
    "imagefolder": (6, "Circle 5."),
    "img2dataset_parquet": (24, "Circle 29."),
    "hf_saved": (5, "Circle 6."),
    "hf_parquet": (7, "Circle 0."),
    "hf_messages": (2, "Two."),
    "shard_list": (8, "c"),
}


def section(written, **others):
    storage, root = written if isinstance(written, tuple) else (written, None)
    info = {"storage": str(storage)} | ({"image_root": str(root)} if root else {})
    processors = {"train": {"name": "blip2_image_eval", "image_size": 28}}
    return {"build_info": info, "vis_processor": processors} | others


def build_datasets(written):
    return registry.get_builder_class("image_text")(section(written), "image_text").build_datasets()["train"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_trained(tmp_path, name, build):
    dataset = build_datasets(getattr(foreign_formats, name)(tmp_path / "data"))
    count, text = FORMATS[name]
    texts = [text for batch in eval_batches("x", dataset, 3, 0, 0) for text in batch["text_input"]]
    assert len(texts) == count and text in texts
    model = build(prompt_template="###Human: {} ###Assistant: ", end_sym="###")
    before, optimizer = (
        model.llama_proj.weight.clone(),
        torch.optim.AdamW(model.llama_proj.parameters(), 1e-2, weight_decay=0),
    )
    loader = make_loader({"x": dataset}, batch_size=4, iters_per_epoch=2)
    for batch in loader.iter_epoch(0):
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert torch.equal(model.llama_proj.weight, before) == (name == "sharegpt")  # which has no images


@pytest.mark.parametrize("name", ["llava", "hf_messages", "img2dataset_parquet", "shard_list", "hf_saved"])
def test_exact_resume_of_every_kind(tmp_path, name):
    dataset = build_datasets(getattr(foreign_formats, name)(tmp_path / "data"))
    whole = list(make_loader({"x": dataset}, iters_per_epoch=6).iter_epoch(0))
    first, second = (make_loader({"x": dataset}, iters_per_epoch=6) for _ in range(2))
    batches = first.iter_epoch(0)
    for _ in range(3):
        next(batches)
    second.load_state_dict([first.state_dict()], 0, 3)
    rest = list(second.iter_epoch(0, 3))
    assert [batch["text_input"] for batch in rest] == [batch["text_input"] for batch in whole[3:]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, whole[3:], strict=True))


def test_kinds_of_data_sets(tmp_path):
    assert isinstance(build_datasets(foreign_formats.shard_list(tmp_path / "a")), ShardDataset)
    assert isinstance(build_datasets(foreign_formats.hf_saved(tmp_path / "b")), PairDataset)
    both = [str(tmp_path / "a" / "shards.txt"), str(tmp_path / "b")]
    builder = registry.get_builder_class("image_text")({"build_info": {"storage": both}}, "image_text")
    told(builder.build_datasets, "names shards and also", str(tmp_path / "b"))


def test_images_in_tables_are_sent_to_workers(tmp_path):
    dataset = build_datasets(foreign_formats.img2dataset_parquet(tmp_path / "data"))
    assert pickle.loads(pickle.dumps(dataset.pairs)) == dataset.pairs
    batches = list(make_loader({"x": dataset}, iters_per_epoch=4, num_workers=2).iter_epoch(0))
    alone = list(make_loader({"x": dataset}, iters_per_epoch=4).iter_epoch(0))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, alone, strict=True))


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


TABLES = {
    "metadata of img2dataset": ([{"url": "u", "caption": "c", "status": "success"}], "url (string), caption (string)"),
    "no caption": ([{"image": b"x", "label": 3}], "image (binary), label (int64)", "caption or text"),
    "an image as a number": ([{"image": 5, "caption": "c"}], "column image", "int64", "bytes"),
    "turns that do not alternate": (
        [{"messages": [{"role": "user", "content": "a"}] * 2}], "row 1 of", "text 2 by the user",
    ),
    "several images of a caption": ([{"images": [b"x", b"y"], "text": "c"}], "row 1 of", "2 images and a caption"),
    "more images than marks": (
        [{"messages": foreign_formats.said("Hi", "Ho"), "images": [b"x"]}], "has 1 images and 0 times <image>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_cannot_be_trained(tmp_path, name):
    rows, *words = TABLES[name]
    file = write_parquet(tmp_path / "x.parquet", rows)
    told(lambda: build_datasets(file), str(file), *words)


def pairs_of(written):
    return [(pair.image, pair.caption) for pair in build_datasets(written).pairs]


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("captions.txt", "|")]
)
def test_tables_of_pandas(tmp_path, name, separator):
    texts = ["a", 'a "b" c', "a, b; c | d", "two\nlines"]
    foreign_formats.pandas_csv(tmp_path / name, texts, separator)
    assert [caption for _, caption in pairs_of(tmp_path / name)] == texts


def test_rows_that_do_not_fit_their_header(tmp_path, caplog):
    foreign_formats.write_images(tmp_path)
    file = tmp_path / "a.csv"
    file.write_text("image,caption\n000000000000.jpg,a, b\n000000000001.jpg,c\n")  # "a" would be half of a caption
    assert [caption for _, caption in pairs_of(file)] == ["c"] and "1 rows" in caplog.text
    file.write_text('image| number| comment\n000000000000.jpg| 0| A "b" | c .\n')
    assert [caption for _, caption in pairs_of(file)] == ['A "b" | c .']
    file.write_text("image,caption,number\n000000000000.jpg,a\n")
    told(lambda: build_datasets(file), str(file), "as many columns as its header")


def test_splits_are_kept_apart(tmp_path):
    """Karpathy's CSV, and files of Hugging Face's hub: validation data are not trained."""
    file, folder = foreign_formats.karpathy_splits(tmp_path / "csv"), foreign_formats.hub_folder(tmp_path / "hub")
    for written in (file, folder):
        info = {"storage": str(written), "val_storage": str(written)}
        both = registry.get_builder_class("image_text")(section(written) | {"build_info": info}, "x").build_datasets()
        assert [{pair.caption for pair in both[name].pairs} for name in ("train", "val")] == [{"of train"}, {"of val"}]
        info = {"storage": str(written), "test_storage": str(written)}
        builder = registry.get_builder_class("image_text")(section(written) | {"build_info": info}, "x")
        told(builder.build_datasets, "test_storage", "the splits", "train", "expected one named test")


def test_paths_in_tables_are_relative_to_the_root(tmp_path):
    file, root = foreign_formats.hf_paths(tmp_path)
    assert pairs_of((file, root)) == [(root / f"{n:012}.jpg", f"Circle {n}.") for n in range(3)]
    told(lambda: build_datasets(file), "3 of 3 images", "image_root")


def test_what_lies_beside_the_data(tmp_path):
    """Caches of map() in a saved folder, and img2dataset's list of downloads beside its files."""
    assert len(build_datasets(foreign_formats.hf_mapped(tmp_path / "a"))) == 5
    assert sorted(caption for _, caption in pairs_of(foreign_formats.img2dataset_files(tmp_path / "b"))) == ["c0", "c1"]


def test_lists_of_shards(tmp_path):
    """Of any name, with a byte order mark and line ends of Windows, and paths relative to the list."""
    foreign_formats.shard_list(tmp_path / "a")
    (tmp_path / "a" / "shards.lst").write_bytes("\ufeff# both\r\n00000.tar\r\n00001.tar\r\n".encode())
    assert build_datasets(tmp_path / "a" / "shards.lst").shards == [str(tmp_path / "a" / f"{n:05}.tar") for n in (0, 1)]
    (tmp_path / "a" / "urls.txt").write_text("https://host/a.jpg?size=1\n")
    told(lambda: build_datasets(tmp_path / "a" / "urls.txt"), "lists images")


def test_other_tables_are_told(tmp_path, monkeypatch):
    foreign_formats.hf_dict(tmp_path / "dict")
    told(lambda: build_datasets(tmp_path / "dict"), "several splits", f"{tmp_path}/dict/train")
    file = foreign_formats.hf_parquet(tmp_path / "p")
    monkeypatch.setattr("minigpt4.datasets.datasets.tables.MAX_GROUP_BYTES", 100)
    told(lambda: build_datasets(file), str(file), "row group", "row_group_size=100")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(file.read_bytes()[:-50] + b"\0" * 50)
    told(lambda: build_datasets(damaged), str(damaged), "cannot be read as a table")
    for state in ('{"_data_files": [{}]}', '{"_data_files": 5}', "[]", "{"):
        (tmp_path / "dict" / "train" / "state.json").write_text(state)
        told(lambda: build_datasets(tmp_path / "dict" / "train"), "state.json")


def test_lists_of_something_else(tmp_path):
    file = tmp_path / "urls.txt"
    file.write_text("https://host/a.jpg\n")
    told(lambda: build_datasets(file), str(file), "img2dataset")
    file.write_text("# shards\nhello\n")
    told(lambda: build_datasets(file), str(file), "'hello'", "(.tar)")
    (tmp_path / "a.csv").write_text("image,caption\n")
    told(lambda: build_datasets(tmp_path / "a.csv"), "a.csv is empty")
    (tmp_path / "a.csv").write_text('image,caption\na.jpg,"' + "x" * 200_000)
    told(lambda: build_datasets(tmp_path / "a.csv"), "a.csv", "CSV")
    file, _ = foreign_formats.coco(tmp_path / "coco")
    told(lambda: build_datasets(file), "images that were looked for are missing", "build_info.image_root")

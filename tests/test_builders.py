"""Builders: from a section under datasets to data sets by split, built-in and in the reference's style."""

import io
import json
from typing import ClassVar

import pytest
import torch
from data_samples import EVAL, make_loader, picture
from omegaconf import OmegaConf
from PIL import Image

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder, load_dataset_config
from minigpt4.datasets.datasets.base_dataset import BaseDataset, ConcatDataset
from minigpt4.datasets.datasets.caption_datasets import CaptionDataset
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor


def test_shard_builder_and_splits(shards, tmp_path):
    info = {"storage": shards[:2], "val_storage": shards[2]}
    sizes = {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 8}}}
    splits = registry.get_builder_class("laion")({"build_info": info, **sizes}, "laion").build_datasets()
    assert set(splits) == {"train", "val"} and splits["train"].shards == shards[:2]
    assert isinstance(splits["train"].vis_processor, Blip2ImageTrainProcessor)
    assert isinstance(splits["val"].vis_processor, Blip2ImageEvalProcessor)
    assert next(splits["val"].iter_eval(WorkerInfo(seed=0)))["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["laion", "cc_sbu", "cc_sbu_align", "image_text"])
def test_builder_without_data(name):
    builder = registry.get_builder_class(name)
    assert builder.default_config_path("default").is_file()
    with pytest.raises(UserError, match=rf"datasets\.{name}\.build_info\.storage is not set"):
        builder({}, name).build_datasets()
    with pytest.raises(UserError, match=rf"datasets\.{name}\.build_info\.storage.*placeholder"):
        builder({"build_info": {"storage": "/path/to/data.tar"}}, name).build_datasets()


# builders and data sets in the reference's style


@pytest.fixture
def own(tmp_path):
    """Two annotation files, five images, and the YAML file of defaults."""
    for number in range(5):
        for name in (f"{number:012}.jpg", f"{number}.jpg"):
            (tmp_path / name).write_bytes(picture(number))
    rows = [{"image_id": str(number), "caption": f"A Dog, {number}!"} for number in range(5)]
    for name, part in (("a.json", rows[:3]), ("b.json", rows[2:])):
        (tmp_path / name).write_text(json.dumps({"annotations": part}))
    section = {"data_type": "images", "build_info": {"storage": "/path/to/own"}}
    OmegaConf.save(OmegaConf.create({"datasets": {"own": section}}), tmp_path / "defaults.yaml")
    return tmp_path


def files(folder, *names):
    return [str(folder / name) for name in names]


def test_processors_by_split():
    size = {"train": {"name": "blip2_image_train", "image_size": 8}}
    text = {"train": {"name": "blip_caption", "max_words": 2}}
    builder = BaseDatasetBuilder(OmegaConf.create({"vis_processor": size, "text_processor": text}))
    for processors in (builder.vis_processors, builder.text_processors):
        assert set(processors) == {"train", "eval"} and all(p("as it is") == "as it is" for p in processors.values())
    builder.build_processors()
    assert isinstance(builder.vis_processors["train"], Blip2ImageTrainProcessor)
    assert isinstance(builder.vis_processors["eval"], Blip2ImageEvalProcessor)
    for split in ("train", "eval"):
        assert builder.vis_processors[split](Image.open(io.BytesIO(picture(1)))).shape == (3, 8, 8)
        assert builder.text_processors[split]("A  Dog! sits") == "a dog"


def test_a_section_a_file_or_the_defaults(own):
    class Builder(BaseDatasetBuilder):
        DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": str(own / "defaults.yaml")}

    assert Builder().config.build_info.storage == "/path/to/own" and Builder().data_type == "images"
    assert Builder(str(own / "defaults.yaml")).config == Builder(own / "defaults.yaml").config == Builder().config
    assert load_dataset_config(own / "defaults.yaml") == Builder().config
    assert Builder({"build_info": {"mine": {"a": 1}}}).config.build_info.mine.a == 1
    assert Builder.default_config_path("other") is None and BaseDatasetBuilder().config == {}


def test_build_datasets_downloads_and_builds():
    calls = []

    class Builder(BaseDatasetBuilder):
        def _download_vis(self):
            calls.append("vis")

        def _download_ann(self):
            calls.append("ann")

        def build(self):
            calls.append("build")
            return {"train": [1]}

    assert Builder({}).build_datasets() == {"train": [1]} and calls == ["ann", "vis", "build"]


def test_data_set_classes_and_annotations_are_enough(own):
    class Builder(BaseDatasetBuilder):
        train_dataset_cls = CaptionDataset
        eval_dataset_cls = CCSBUAlignDataset

    annotations = {"train": {"storage": files(own, "a.json", "b.json")}, "val": {"storage": str(own / "b.json")}}
    section = {
        "build_info": {"annotations": annotations, "images": {"storage": str(own)}},
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": 8}},
    }
    splits = Builder(section, "own").build_datasets()
    assert {split: (type(data), len(data)) for split, data in splits.items()} == {
        "train": (CaptionDataset, 6),
        "val": (CCSBUAlignDataset, 3),
    }
    assert splits["train"][0]["text_input"] == "a dog, 0" and splits["val"][0]["text_input"] == "A Dog, 2!"
    assert splits["train"][5]["image"].shape == (3, 8, 8) and splits["val"][1]["image_id"] == 1
    with pytest.raises(UserError, match=r"datasets\.own\.build_info\.annotations is not set; .* overrides build\(\)"):
        Builder({}, "own").build_datasets()


def test_base_dataset(own):
    dataset = BaseDataset(str, repr, str(own), files(own, "a.json", "b.json"))
    assert len(dataset) == 6 and [entry["instance_id"] for entry in dataset.annotation] == list("012345")
    assert dataset.vis_root == str(own) and dataset.vis_processor is str and dataset.text_processor is repr
    batch = dataset.collater([{"a": torch.ones(2), "t": "x"}, {"a": torch.zeros(2), "t": "y"}])
    assert batch["a"].shape == (2, 2) and batch["t"] == ["x", "y"]
    dataset.set_processors(len, ascii)
    assert dataset.vis_processor is len and dataset.text_processor is ascii
    assert len(BaseDataset()) == 0


def test_caption_datasets(own):
    arguments = {"vis_processor": EVAL, "text_processor": str.lower, "vis_root": str(own)}
    dataset = CaptionDataset(**arguments, ann_paths=files(own, "b.json", "a.json"))
    assert [dataset[i]["image_id"] for i in range(6)] == [0, 1, 2, 3, 4, 0]  # in the order in which ids appear
    assert dataset.img_ids == {"2": 0, "3": 1, "4": 2, "0": 3, "1": 4}
    assert torch.equal(dataset[3]["image"], EVAL(Image.open(own / f"{0:012}.jpg")))
    align = CCSBUAlignDataset(**arguments, ann_paths=files(own, "a.json"))
    assert align[1]["text_input"] == "A Dog, 1!" and torch.equal(align[1]["image"], EVAL(Image.open(own / "1.jpg")))


def test_concatenated_data_sets(own):
    arguments = {"vis_processor": EVAL, "text_processor": str.lower, "vis_root": str(own)}
    first, second = (CaptionDataset(**arguments, ann_paths=files(own, name)) for name in ("a.json", "b.json"))
    both = ConcatDataset([first, second])
    assert len(both) == 6 and both[4]["text_input"] == "a dog, 3!"
    batch = both.collater([{**both[0], "only": 1}, both[5]])
    assert set(batch) == {"image", "text_input", "image_id"} and batch["image"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_they_train(own, num_workers, time_limit):
    dataset = CaptionDataset(EVAL, str.lower, str(own), files(own, "a.json"))
    batches = list(make_loader({"x": dataset}, batch_size=3, iters_per_epoch=2, num_workers=num_workers).iter_epoch(0))
    assert [sorted(batch["image_id"].tolist()) for batch in batches] == [[0, 1, 2], [0, 1, 2]]
    assert batches[0]["image"].shape == (3, 3, 8, 8) and batches[0]["text_input"][0].startswith("a dog")
    (own / f"{1:012}.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000001\.jpg' cannot be read as an image"):
        list(make_loader({"x": dataset}, batch_size=3, num_workers=num_workers).iter_epoch(0))


def test_processors_without_a_name_are_those_of_the_split():
    sections = {"vis_processor": {"train": {"image_size": 28}}, "text_processor": {"train": {"max_words": 3}}}
    builder = BaseDatasetBuilder(sections)
    builder.build_processors()
    found = [type(builder.vis_processors[split]) for split in ("train", "eval")]
    assert found == [Blip2ImageTrainProcessor, Blip2ImageEvalProcessor]
    assert {processor.image_size for processor in builder.vis_processors.values()} == {28}
    assert builder.text_processors["eval"].max_words == 3

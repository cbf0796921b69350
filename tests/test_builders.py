"""Builders: a section under datasets to its splits."""

import pytest

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
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

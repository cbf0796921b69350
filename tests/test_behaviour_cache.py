"""What a feature cache is refused for, and what its crops are, through the task and its configuration."""

import shutil

import pytest
import torch
from behaviour import load_config, write_config

from minigpt4.common.errors import UserError
from minigpt4.tasks import setup_task
from quickstart import scenes


@pytest.fixture
def cached(tmp_path):
    """The data set of features of two shards with the same ten images, under changed settings."""
    if not (tmp_path / "shards").exists():
        scenes.write_shards(tmp_path / "shards", num_shards=1, scenes_per_shard=10, seed=1)
        (shard,) = (tmp_path / "shards").glob("*.tar")
        shutil.copy(shard, shard.with_name("00001.tar"))

    def build(processor="blip2_image_train", model=None, folder="cache", **run):
        section = {
            "build_info": {"storage": f"{tmp_path}/shards/*.tar"},
            "vis_processor": {"train": {"name": processor, "image_size": 28}},
            "text_processor": {"train": {"name": "blip_caption"}},
        }
        run = {"feature_cache": str(tmp_path / folder), "output_dir": str(tmp_path / "out"), "seed": 1} | run
        cfg = load_config(write_config(tmp_path / "run.yaml", run, {"cc_sbu": section}, model))
        return setup_task(cfg).build_datasets(cfg)["cc_sbu"]["train"]

    return build


def features(dataset):
    return torch.stack([dataset[index]["features"].float() for index in range(len(dataset))])


def refused(call, *words):
    with pytest.raises(UserError, match=r"run\.feature_cache") as error:
        call()
    assert not [word for word in words if word not in str(error.value)], error.value


def qformer(tiny_config, **changes):
    return {"qformer_config": tiny_config["qformer_config"] | changes}


def test_features_of_another_q_former_are_refused(cached, tiny_config):
    """Two heads in place of four: the same weights fit, and compute other features."""
    cached("blip2_image_eval")
    refused(lambda: cached("blip2_image_eval", qformer(tiny_config, num_attention_heads=2)), "model")
    other = cached("blip2_image_eval", qformer(tiny_config, num_attention_heads=2), folder="other")
    assert not torch.allclose(features(other), features(cached("blip2_image_eval")), atol=1e-2)


def test_random_crops_of_another_seed_are_refused(cached):
    cached()
    refused(lambda: cached(seed=2), "seed")
    cached()  # and the same ones are not


def test_crops_that_are_not_random_do_not_depend_on_the_seed(cached):
    whole = features(cached("blip2_image_eval"))
    assert torch.equal(features(cached("blip2_image_eval", seed=2)), whole)


def test_the_same_images_in_two_parts_get_different_crops(cached):
    first, second = features(cached()).chunk(2)
    whole = features(cached("blip2_image_eval", folder="whole")).chunk(2)
    assert len(first) == 10 and torch.equal(*whole)  # the images are the same
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_crops_of_a_sample_are_different(cached):
    """One of three is drawn whenever a sample is read."""
    dataset = cached(feature_crops=3)
    torch.manual_seed(0)
    assert len({dataset[4]["features"].float().sum().item() for _ in range(60)}) == 3


def test_a_cache_that_is_computed_again_is_the_same(cached):
    assert torch.equal(features(cached()), features(cached(folder="again")))

"""What a run reports before it spends time."""

import argparse

import pytest
import torch

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.tasks import setup_task
from minigpt4.tasks.base_task import BaseTask
from quickstart import scenes


def config(*options):
    return Config(argparse.Namespace(cfg_path="train_configs/quickstart_stage1.yaml", options=list(options)))


def test_a_wrong_checkpoint_is_reported_before_features_are_computed(tmp_path):
    scenes.write_shards(tmp_path / "shards", num_shards=1, scenes_per_shard=4, seed=1)
    torch.save({"llama_proj.weight": torch.zeros(5120, 128)}, tmp_path / "other.pth")
    options = [f"datasets.cc_sbu.build_info.storage={tmp_path}/shards", f"run.feature_cache={tmp_path}/cache"]
    cfg = config(*options, "run.device=cpu", f"model.ckpt={tmp_path}/other.pth").check()
    with pytest.raises(UserError, match=r"model\.ckpt.*13B"):
        setup_task(cfg).build_datasets(cfg)
    assert not (tmp_path / "cache").exists()


def test_splits_without_storage_are_left_to_tasks_from_outside():
    with pytest.raises(UserError, match=r"run\.valid_splits names 'val'.*val_storage"):
        config("run.valid_splits=[val]").check()

    @registry.register_task("own_splits")
    class OwnTask(BaseTask):
        pass

    config("run.valid_splits=[val]", "run.task=own_splits").check()

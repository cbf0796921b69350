"""From a configuration to data sets and a model, and from a batch to a loss."""

from typing import Any

import torch
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.registry import registry
from minigpt4.datasets.feature_cache import with_features


class BaseTask:
    """The task that every other builds on."""

    @classmethod
    def setup_task(cls, cfg: Any) -> "BaseTask":
        """Builds the task; subclasses may read the configuration."""
        return cls()

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Every data set of ``cfg.datasets_cfg`` as {name: {split: data set}}, of features by ``run.feature_cache``."""
        datasets = {}
        for name, section in cfg.datasets_cfg.items():
            builder = registry.get_builder_class(name)(section)
            builder.name = name
            datasets[name] = builder.build_datasets()
        run_cfg = cfg.config.get("run") or {}
        return with_features(cfg, datasets, devices.of_run(run_cfg)) if run_cfg.get("feature_cache") else datasets

    def build_model(self, cfg: Any) -> nn.Module:
        """The model of ``cfg.model_cfg`` with its weights, on the run's device and in the precisions that fit it."""
        run_cfg = cfg.config.get("run") or {}
        is_sharded = run_cfg.get("parallel") == "fsdp" and dist_utils.get_world_size() > 1
        model_class = registry.get_model_class(cfg.model_cfg.arch)
        has_vision = not run_cfg.get("feature_cache")
        return model_class.from_config(
            cfg.model_cfg, device=devices.of_run(run_cfg), is_sharded=is_sharded, has_vision=has_vision
        )

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """A batch to the model's output, with ``loss`` among it."""
        return model(samples)

    @torch.no_grad()
    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """A validation batch to the model's output, with ``loss`` and ``num_targets`` among it."""
        return model(samples)

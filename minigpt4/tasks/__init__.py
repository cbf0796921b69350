"""Tasks by registered name: what is built, what one training step is, and how a model is evaluated."""

from typing import Any

import torch

from minigpt4.common import device as devices
from minigpt4.common.registry import registry
from minigpt4.common.schema import RunConfig, read_section
from minigpt4.tasks.base_task import BaseTask
from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask

__all__ = ["BaseTask", "ImageTextPretrainTask", "setup_task"]


def setup_task(cfg: Any, device: torch.device | None = None) -> BaseTask:
    """Creates the task that ``run.task`` names, for a device; by default for the one that ``run.device`` selects.

    Raises:
        UserError: there is no task of that name.
    """
    run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
    task = registry.get_task_class(run_cfg.task).setup_task(cfg=cfg)
    task.device = device or devices.from_config(run_cfg)
    return task

"""Tasks by registered name: what is built and what one step is."""

from typing import Any

from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask
from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask

__all__ = ["BaseTask", "ImageTextPretrainTask", "setup_task"]


def setup_task(cfg: Any) -> BaseTask:
    """The task that ``run.task`` names; raises UserError where there is none."""
    return registry.get_task_class(cfg.run_cfg.get("task", "image_text_pretrain")).setup_task(cfg=cfg)

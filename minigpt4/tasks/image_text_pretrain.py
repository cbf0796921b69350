"""The task of both stages: predict a caption from its image."""

from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask


@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """Equal to the base task; registered under the name that YAML files use."""

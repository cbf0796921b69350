"""Run by hand where vLLM is installed: MINIGPT4_FOLDER=FOLDER python -m pytest plugins/vllm/tests."""

import os

import pytest
from PIL import Image
from transformers import AutoProcessor


@pytest.fixture(scope="session")
def folder():
    """A folder that ``python -m minigpt4.tools.export_hf --dtype float32`` wrote; best a trained model's."""
    return os.environ["MINIGPT4_FOLDER"]


@pytest.fixture(scope="session")
def processor(folder):
    """transformers' own, which this project's tests compare with its chat."""
    return AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="session")
def images():
    gradient = Image.linear_gradient("L").resize((90, 70))
    return [Image.merge("RGB", (gradient, *others)) for others in ((gradient,) * 2, (gradient.rotate(180),) * 2)]

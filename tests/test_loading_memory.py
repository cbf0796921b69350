"""Processes that load the same language model share one copy of it in memory."""

import pytest
import torch

from benchmarks import loading_memory


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_three_processes_share_one_copy_of_a_language_model(tmp_path, kind):
    size = loading_memory.write_folder(tmp_path, 0.25, torch.bfloat16, kind)
    peak = loading_memory.measure(tmp_path, 3, torch.bfloat16)
    assert size > 2**27 and peak < 1.3 * size

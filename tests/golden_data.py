"""Where the golden numbers of the original are, and how to read them; golden/README.md says what each file holds."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
# Tests against recorded numbers can run on another device: MINIGPT4_TEST_DEVICE=cuda pytest tests/test_forward.py
DEVICE = torch.device(os.environ.get("MINIGPT4_TEST_DEVICE", "cpu"))
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="is about the CPU")


def read_json(name, folder=TINY):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_tensors(name):
    return load_file(TINY / f"{name}.safetensors")


def close(actual, expected, atol):
    """Whether two tensors agree in shape and, within ``atol``, in value."""
    actual, expected = actual.cpu(), expected.cpu()
    return actual.shape == expected.shape and (actual - expected).abs().max().item() <= atol


def padded_rows(model, captions, prompts):
    """A model's training rows padded on the right as the original pads them: ids, mask and labels [B, T]."""
    rows = model.tokenize_rows(captions, prompts)
    ids, labels = ([torch.tensor(getattr(row, name)) for row in rows] for name in ("ids", "labels"))
    return (
        pad_sequence(ids, True, model.llama_tokenizer.pad_token_id),
        pad_sequence([torch.ones_like(row) for row in ids], True),
        pad_sequence(labels, True, -100),
    )

"""Masks are of the form that fused kernels accept, also those of NPUs: none, or bool that broadcasts over the heads.

The calls are recorded on the CPU; that a card's kernel then computes attention is tested by the doctor on the card.
"""

from dataclasses import replace

import pytest
import torch
from golden_data import read_json, read_tensors
from torch.overrides import TorchFunctionMode

from minigpt4.conversation.answer_batch import AnswerBatch
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.processors import Blip2ImageEvalProcessor

IMAGES = read_tensors("vision")["image"]


class Recorded(TorchFunctionMode):
    """Keeps queries, keys and masks of all calls of PyTorch's attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            self.calls.append(given | kwargs)
        return function(*args, **kwargs)

    def check(self):
        """Checks all calls; returns the kinds that occurred: without a mask True, with one False."""
        for call in self.calls:
            query, key, mask = call["query"], call["key"], call.get("attn_mask")
            assert query.dim() == key.dim() == call["value"].dim() == 4 and query.shape[-1] <= 512
            assert not call.get("dropout_p")
            if mask is None:  # kernels align is_causal differently where lengths differ
                assert not call.get("is_causal") or query.shape[2] == key.shape[2]
                continue
            batch, heads, num_queries, num_keys = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
            assert mask.dtype == torch.bool and not call.get("is_causal")
            shapes = [(b, h, num_queries, num_keys) for b in (1, batch) for h in (1, heads)]
            assert tuple(mask.shape) in [*shapes, (num_queries, num_keys)], (mask.shape, query.shape, key.shape)
        return {call.get("attn_mask") is None for call in self.calls}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training(model, monkeypatch, stage):
    """Plain attention everywhere."""
    info = read_json("forward.json")[stage]
    monkeypatch.setattr(model, "end_sym", info["end_sym"])
    monkeypatch.setattr(model, "prompt_list", [info["prompt_used"]] if "prompt_used" in info else [])
    with Recorded() as recorded:
        model({"image": IMAGES[:3], "text_input": info["text_input"]})["loss"].backward()
    assert recorded.check() == {True}


def test_chats_of_different_lengths_together(model):
    chat = Chat(model, Blip2ImageEvalProcessor(28))
    batch, options = AnswerBatch(chat), GenerationOptions(do_sample=False, max_new_tokens=4)
    with Recorded() as recorded:
        for owner, question in enumerate(["Why?", "Please describe the image in as many words as you can."]):
            conv, images = replace(CONV_VISION.copy(), owner=str(owner)), []
            chat.upload_img(IMAGES[owner], conv, images)
            chat.ask(question, conv)
            batch.add(conv, images, batch.plan(conv, 1, options))
        while len(batch):
            batch.step()
    assert recorded.check() == {True, False}

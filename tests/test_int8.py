"""8-bit weights: close to the plain layer in every precision, gradients to the input, few rows and many."""

import pytest
import torch
from architectures import write_language_model
from golden_data import read_tensors
from torch import nn

from minigpt4.models.int8 import MAX_KERNEL_ROWS, Int8Linear, to_int8
from minigpt4.models.language_model import load_language_model

IMAGES = read_tensors("vision")["image"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 48, 172], ids=str)  # PyTorch's kernel takes the first alone
@pytest.mark.parametrize("rows", [1, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1], ids=str)
def test_a_layer_and_its_gradient_are_close_to_the_plain_ones(dtype, width, rows):
    torch.manual_seed(0)
    plain = nn.Linear(width, 24).requires_grad_(False)
    layer, x = Int8Linear(plain), torch.randn(2, rows, width)
    results = []
    for module, inputs in ((plain, x.clone()), (layer, x.to(dtype))):
        inputs.requires_grad_()
        output = module(inputs)
        output.square().sum().backward()
        results.append((output.detach().float(), inputs.grad.float()))
    assert layer(x.to(dtype)).dtype == dtype
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() / expected.norm() < 0.02


def test_only_the_output_layer_and_the_embeddings_keep_their_precision(tmp_path):
    llm = load_language_model(write_language_model(tmp_path, "llama2"), torch.float32)
    expected = llm(input_ids=torch.arange(1, 9)[None]).logits
    to_int8(llm)
    assert {type(layer) for layer in llm.base_model.layers[0].self_attn.children()} == {Int8Linear}
    assert type(llm.lm_head) is nn.Linear and llm.base_model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    actual = llm(input_ids=torch.arange(1, 9)[None]).logits
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("changes", [{"llm_precision": "int8"}, {"low_resource": True}], ids=str)
def test_the_loss_of_the_recorded_model_stays_within_a_percent(build, model, changes):
    samples = {"image": IMAGES, "text_input": ["a dog", "a cat on a mat", "x"]}
    quantized = build(**changes)
    loss = quantized(samples)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(model(samples)["loss"].item(), rel=0.01)
    assert quantized.llama_proj.weight.grad.norm() > 0

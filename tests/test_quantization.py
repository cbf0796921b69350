"""Weights of 8 and 4 bits: close to the plain layer in every precision, gradients to the input, few rows and many."""

import sys

import pytest
import torch
from architectures import write_language_model
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from golden_data import DEVICE, read_tensors
from torch import nn

from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig
from minigpt4.models import loading
from minigpt4.models.language_model import load_language_model
from minigpt4.models.quantization import BLOCK_SIZE, LAYERS, MAX_KERNEL_ROWS, Int8Linear, NF4Linear, quantize_layers

IMAGES = read_tensors("vision")["image"].to(DEVICE)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "height"), [(32, 24), (172, 64), (46, 25)], ids=str)  # blocks cross the rows
def test_nf4_is_computed_with_the_dequantised_weight(dtype, width, height):
    torch.manual_seed(0)
    plain = nn.Linear(width, height, bias=False).to(dtype).requires_grad_(False)
    layer, results = NF4Linear(plain), []
    dequantised = dequantize_4bit(*quantize_4bit(plain.weight.data, blocksize=BLOCK_SIZE, quant_type="nf4"))
    assert 0.05 < (dequantised - plain.weight).norm() / plain.weight.norm() < 0.12
    plain.weight = nn.Parameter(dequantised, requires_grad=False)
    for module in (plain, layer):
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        with torch.no_grad():  # another kernel on some devices
            results.append((y.detach(), x.grad, module(x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("kind", "dtype", "limit"), [("int8", torch.int8, 0.05), ("nf4", torch.uint8, 1.0)])
def test_only_the_output_layer_and_the_embeddings_keep_their_precision(tmp_path, kind, dtype, limit):
    llm = load_language_model(write_language_model(tmp_path, "llama2"), torch.float32)
    expected = llm(input_ids=torch.arange(1, 9)[None]).logits
    quantize_layers(llm, kind)
    assert {type(layer) for layer in llm.base_model.layers[0].self_attn.children()} == {LAYERS[kind]}
    assert type(llm.lm_head) is nn.Linear and llm.base_model.layers[0].mlp.up_proj.weight.dtype == dtype
    actual = llm(input_ids=torch.arange(1, 9)[None]).logits
    assert 0 < (actual - expected).norm() / expected.norm() < limit


def test_nf4_without_its_package_or_on_another_device_is_refused(build, monkeypatch):
    cfg = ModelConfig(llm_precision="nf4")
    with pytest.raises(UserError, match="needs kernels of bitsandbytes, which has none for mps"):
        loading.quantization(cfg, torch.device("mps"))
    assert loading.quantization(ModelConfig(low_resource=True, llm_precision="nf4"), torch.device("cpu")) == "nf4"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"model\.llm_precision: nf4 needs .*; install it: pip install bitsandbytes"):
        build(llm_precision="nf4")


@pytest.mark.parametrize("changes", [{"llm_precision": "int8"}, {"low_resource": True}], ids=str)
def test_the_loss_of_the_recorded_model_stays_within_a_percent(build, model, changes):
    samples = {"image": IMAGES, "text_input": ["a dog", "a cat on a mat", "x"]}
    quantized = build(**changes)
    loss = quantized(samples)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(model(samples)["loss"].item(), rel=0.01)
    assert quantized.llama_proj.weight.grad.norm() > 0

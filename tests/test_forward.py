"""Training rows, logits, losses and gradients of both stages."""

import copy
import random

import pytest
import torch
from golden_data import DEVICE, close, padded_rows, read_json, read_tensors
from torch import nn

from minigpt4.common.errors import UserError
from minigpt4.models.loading import read_prompts
from minigpt4.models.mini_gpt4 import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX

FORWARD = read_json("forward.json")
IMAGES = read_tensors("vision")["image"].to(DEVICE)
STAGES = ("stage1", "stage2")


@pytest.fixture(params=STAGES)
def stage(request, model, monkeypatch):
    """The shared model as a stage sets it up, its golden text side and its golden tensors."""
    info = FORWARD[request.param]
    monkeypatch.setattr(model, "max_txt_len", info["max_txt_len"])
    monkeypatch.setattr(model, "end_sym", info["end_sym"])
    monkeypatch.setattr(model, "prompt_list", [info["prompt_used"]] if "prompt_used" in info else [])
    model.zero_grad()
    yield model, info, read_tensors(f"{request.param}_forward")
    model.zero_grad()


def packed(model, info):
    return padded_rows(model, info["text_input"], [info.get("prompt_used", IMAGE_PLACEHOLDER)] * 3)


def test_rows(stage):
    model, info, golden = stage
    ids, mask, labels = packed(model, info)
    assert torch.equal(mask, golden["attention_mask"])
    assert torch.equal(labels, golden["labels"])
    text = golden["text_input_ids"][golden["text_attention_mask"] == 1]
    assert ids[labels != IGNORE_INDEX].tolist() == text.tolist()
    assert (ids == IMAGE_TOKEN_INDEX).sum(1).tolist() == [8] * 3
    assert ids[mask == 0].unique().tolist() in ([], [model.llama_tokenizer.pad_token_id])


def test_prompt_ids(stage):
    model, info, golden = stage
    ids = packed(model, info)[0][0].tolist()
    before = golden.get("prompt_before_ids", torch.tensor([])).flatten().tolist()
    after = golden.get("prompt_after_ids", torch.tensor([])).flatten().tolist()
    expected = [model.llama_tokenizer.bos_token_id, *before, *[IMAGE_TOKEN_INDEX] * 8, *after]
    assert ids[: len(expected)] == expected


def test_embeddings_and_logits(stage):
    model, info, golden = stage
    ids, mask, labels = packed(model, info)
    with torch.no_grad():
        embeds = model.embed_inputs(ids.to(DEVICE), model.encode_img(IMAGES)[0])
        assert close(embeds, golden["inputs_embeds"], 2e-5)
        logits = model.llama_model(inputs_embeds=embeds, attention_mask=mask.to(DEVICE)).logits.cpu()
    if "logits" in golden:
        real = mask.bool()
        assert close(logits[real], golden["logits"][real], 5e-5)
        return
    real = mask[:, golden["logits_positions"]].bool()
    assert close(logits[:, golden["logits_positions"]][real], golden["logits_at_positions"][real], 5e-5)
    assert close(logits.logsumexp(-1)[mask.bool()], golden["logits_logsumexp"][mask.bool()], 5e-5)
    targets = labels[:, 1:]
    logprob = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert close(logprob * (targets != IGNORE_INDEX), golden["label_logprob"], 5e-5)


def test_loss_and_gradients(stage):
    model, info, golden = stage
    output = model({"image": IMAGES, "text_input": info["text_input"]})
    assert output["loss"].ndim == 0
    assert output["loss"].item() == pytest.approx(golden["loss"].item(), abs=2e-5)
    assert output["num_targets"] == (golden["labels"] != IGNORE_INDEX).sum()
    assert output["num_tokens"] == golden["attention_mask"].sum()
    assert output["num_padded_tokens"] == golden["attention_mask"].numel()
    output["loss"].backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert sorted(with_gradient) == sorted(info["params_with_grad"])
    for name in ("weight", "bias"):
        expected = golden[f"grad_llama_proj_{name}"]
        difference = getattr(model.llama_proj, name).grad.cpu() - expected
        assert difference.norm() / expected.norm() < 1e-4


def test_end_token_written_out_in_a_caption(model, monkeypatch):
    """Its id is the padding's too, so it is no target, yet it is attended to."""
    monkeypatch.setattr(model, "max_txt_len", 32)
    golden = read_tensors("eos_in_text_forward")
    tokenizer = model.llama_tokenizer
    rows = [ids[mask == 1] for ids, mask in zip(golden["text_input_ids"], golden["text_attention_mask"], strict=True)]
    texts = ["a</s> b", tokenizer.decode(rows[1]).removesuffix("\n")]
    ids, mask, labels = padded_rows(model, texts, [IMAGE_PLACEHOLDER] * 2)
    assert [model.tokenize(text + "\n") for text in texts] == [row.tolist() for row in rows]
    assert torch.equal(mask, golden["attention_mask"]) and torch.equal(labels, golden["labels"])
    assert (ids[mask == 1] == tokenizer.eos_token_id).sum() == 1
    with torch.no_grad():
        loss = model({"image": IMAGES[:2], "text_input": texts})["loss"]
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=2e-5)


def test_only_the_projection_trains(model):
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"llama_proj.weight", "llama_proj.bias"} == set(model.trainable_state_dict())


def test_no_graph_is_kept_for_vision(model):
    outputs = []
    parts = (model.visual_encoder.blocks[0], model.ln_vision, model.Qformer)
    hooks = [part.register_forward_hook(lambda _, __, output: outputs.append(output)) for part in parts]
    embeds, _ = model.train().encode_img(IMAGES)
    for hook in hooks:
        hook.remove()
    assert [output.requires_grad for output in outputs] == [False] * 3
    assert embeds.requires_grad


def test_frozen_parts_stay_in_eval_mode(model):
    model.train()
    for part in (model.visual_encoder, model.ln_vision, model.Qformer, model.llama_model):
        assert not any(module.training for module in part.modules())
    assert model.llama_proj.training


def test_unfrozen_vision_gets_gradients(build):
    model = build(freeze_vit=False, freeze_qformer=False)
    model({"image": IMAGES, "text_input": ["a", "b", "c"]})["loss"].backward()
    for name in ("visual_encoder.blocks.0.attn.qkv.weight", "ln_vision.weight", "query_tokens"):
        assert model.get_parameter(name).grad.norm() > 0
    assert all(p.grad is None for p in model.llama_model.parameters())


def test_instructions_of_samples(model, monkeypatch):
    monkeypatch.setattr(model, "prompt_list", ["drawn <ImageHere>"])
    monkeypatch.setattr(model, "prompt_template", "###Human: {} ###Assistant: ")
    samples = {"text_input": ["a", "b"], "instruction": [None, "What is it?"]}
    own = "###Human: <Img><ImageHere></Img> What is it? ###Assistant: "
    assert model.choose_prompts(samples) == ["drawn <ImageHere>", own]
    monkeypatch.setattr(model, "prompt_template", "")
    with pytest.raises(UserError, match="prompt_template"):
        model.choose_prompts(samples)


def test_prompt_file(tmp_path):
    info = FORWARD["stage2"]
    file = tmp_path / "prompts.txt"
    lines = [p.removeprefix("###Human: ").removesuffix(" ###Assistant: ") for p in info["prompt_list"]]
    file.write_text("\n".join(["a line without the mark", *lines]))
    assert read_prompts(str(file), info["prompt_template"]) == info["prompt_list"]
    assert read_prompts(None, "") == []


@pytest.mark.parametrize(
    ("content", "template", "words"),
    [
        ("no mark", "{}", ("prompt_path", "<ImageHere>")),
        ("<ImageHere> <ImageHere>", "{}", ("prompt_path", "more than once")),
        ("<ImageHere>", "", ("prompt_template", "{}")),
    ],
)
def test_bad_prompt_file(tmp_path, content, template, words):
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(file), template)
    assert all(word in str(error.value) for word in words)


def test_gradient_checkpointing_gives_the_same_numbers(build):
    samples = {"image": IMAGES, "text_input": ["a dog", "a cat on a mat", "x"]}
    results = []
    for changes in ({}, {"llm_grad_checkpoint": True}):
        model = build(**changes)
        loss = model(samples)["loss"]
        loss.backward()
        results.append((loss.item(), model.llama_proj.weight.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("changes", [{}, {"lora_r": 4, "lora_dropout": 0.0}], ids=["frozen", "LoRA"])
def test_any_number_of_layers_is_compiled_in_few_graphs(build, monkeypatch, changes):
    """PyTorch stops after eight."""
    from torch._dynamo.utils import counters

    model, compile_module = build(**changes), nn.Module.compile
    layers = model.llama_model.model.layers
    layers.extend(copy.deepcopy(layers[0]) for _ in range(12 - len(layers)))
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.llama_model.config.num_hidden_layers = 12
    batch = {"image": IMAGES, "text_input": ["a", "a red circle", "two words"]}
    expected = model(batch)["loss"]
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **settings: compile_module(self, backend="eager", **settings)
    )
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model.compile_parts()
        for captions in (batch["text_input"], ["some words more", "b", "c"], ["d", "e", "f"]):
            loss = model(batch | {"text_input": captions})["loss"]
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
            assert captions is not batch["text_input"] or torch.allclose(loss, expected, atol=1e-6)
    assert 3 <= counters["stats"]["unique_graphs"] - before <= 8


def test_rows_of_other_lengths_do_not_touch_each_other(model):
    """A row's loss is the same alone and beside longer and shorter ones, whose tokens are in the same sequence."""
    image, texts = IMAGES, ["a dog", "a very long caption of many words indeed", "x y"]
    alone = [model({"image": image[i : i + 1], "text_input": [text]}) for i, text in enumerate(texts)]
    together = model({"image": image, "text_input": texts})
    total = sum(output["loss"] * output["num_targets"] for output in alone)
    assert together["num_targets"] == sum(output["num_targets"] for output in alone)
    assert (total / together["num_targets"]).item() == pytest.approx(together["loss"].item(), abs=1e-5)


@pytest.mark.parametrize("prompts", [["<Img><ImageHere></Img> one", "Look: <ImageHere> two"], []])
def test_prefixes_that_differ_within_a_batch_are_computed_with_their_rows(build, prompts):
    model = build(prompt_template="###Human: {} ###Assistant: ")
    model.prompt_list = [model.prompt_template.format(prompt) for prompt in prompts]
    samples = {"image": IMAGES[:2], "text_input": ["a dog", "a cat"], "instruction": ["What?", None]}
    if not prompts:
        samples["instruction"] = ["What?", "Where?"]
    random.seed(0)
    mixed = model(samples)
    model.packs_rows = False
    random.seed(0)
    assert model(samples)["loss"].item() == pytest.approx(mixed["loss"].item(), abs=1e-5) and mixed["num_targets"] > 0

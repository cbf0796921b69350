"""MiniGPT-4 with every supported kind of language model: both stages and a chat, against plain transformers."""

import pytest
import torch
from architectures import ARCHITECTURES, write_language_model
from golden_data import padded_rows, read_tensors
from transformers import AutoModelForCausalLM

from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.models.mini_gpt4 import IMAGE_PLACEHOLDER
from minigpt4.models.text_rows import shared_length

IMAGES = read_tensors("vision")["image"]
CAPTIONS = ["a dog", "a very long caption of many words indeed", "x y"]
TEMPLATE = "###Human: {} ###Assistant: "
STAGES = {
    "stage 1": {"end_sym": "\n", "max_txt_len": 32},
    "stage 2": {"end_sym": "###", "max_txt_len": 160, "prompt_template": TEMPLATE},
}


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    return write_language_model(tmp_path / "llm", request.param)


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradients_of_the_pixels_equal_plain_transformers(build, folder, stage):
    model = build(llama_model=str(folder), ckpt=None, **STAGES[stage])
    prompt = IMAGE_PLACEHOLDER
    if stage == "stage 2":
        prompt = TEMPLATE.format(f"<Img>{IMAGE_PLACEHOLDER}</Img> Describe it.")
        model.prompt_list = [prompt]
    pixels = IMAGES.clone().requires_grad_()
    loss = model({"image": pixels, "text_input": CAPTIONS})["loss"]
    (gradient,) = torch.autograd.grad(loss, pixels)

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    total, count, others = 0, 0, IMAGES.clone().requires_grad_()
    for caption, embeds in zip(CAPTIONS, model.encode_img(others)[0], strict=True):  # row by row
        ids, _, labels = padded_rows(model, [caption], [prompt])
        output = plain(inputs_embeds=model.embed_inputs(ids, embeds[None]), labels=labels)
        num_targets = int((labels[:, 1:] != -100).sum())
        total, count = total + output.loss * num_targets, count + num_targets
    expected = total / count
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, others)[0], atol=1e-5, rtol=1e-3)


def test_a_chat_answers_as_plain_transformers_does(build, folder):
    model = build(llama_model=str(folder), ckpt=None)
    chat, conv, images = Chat(model, None, "cpu"), CONV_VISION.copy(), []
    chat.upload_img(IMAGES[0], conv, images)
    chat.ask("What is it?", conv)
    waiting = conv.copy()
    waiting.append_message(conv.roles[1], None)
    context = model.get_context_emb(waiting.get_prompt(), images)
    _, ids = chat.answer(conv, images, do_sample=False, max_new_tokens=8)
    with torch.no_grad():
        expected = model.llama_model.generate(inputs_embeds=context, max_new_tokens=8, do_sample=False)[0].tolist()
    expected = expected[expected[:1] == [model.llama_tokenizer.bos_token_id] :]
    assert len(ids) and ids.tolist() == expected[: len(ids)]


def test_a_language_model_without_begin_token_gets_none(build, tmp_path):
    folder = write_language_model(tmp_path / "llm", "qwen2")
    (folder / "tokenizer.model").unlink()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(33 + i): i for i in range(94)} | {"Ġ": 94, "Ċ": 95, "<|end|>": 96}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}'
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "special_tokens_map.json").unlink()
    model = build(llama_model=str(folder), ckpt=None)
    assert model.bos_ids == [] and model.llama_tokenizer.eos_token_id == 96
    row = model.tokenize_rows(["ab"], [IMAGE_PLACEHOLDER])[0]
    assert row.ids == [-1] * 8 + [vocabulary["a"], vocabulary["b"], 95] and shared_length([row, row]) == 0
    loss = model({"image": IMAGES[:1], "text_input": ["ab"]})["loss"]
    plain = model.llama_model(
        inputs_embeds=model.embed_inputs(torch.tensor([row.ids]), model.encode_img(IMAGES[:1])[0]),
        labels=torch.tensor([row.labels]),
    )
    assert loss.item() == pytest.approx(plain.loss.item(), abs=1e-5)

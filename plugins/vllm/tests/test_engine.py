"""An engine computes the embeddings and gives the answers of transformers, from the same folder."""

import functools
import os

import pytest
import torch
from transformers import AutoModelForImageTextToText

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for apply_model
SETTINGS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
QUESTIONS = ("Describe this image in detail.", "How many objects are there?")


@pytest.fixture(scope="module")
def llm(folder):
    from vllm import LLM

    llm = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True, gpu_memory_utilization=0.3)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def blip2(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def conversations(images):
    """About one image, about two of them, about one in a second turn, and about none."""
    parts = [{"type": "image_pil", "image_pil": image} for image in images]
    first, second = ({"type": "text", "text": question} for question in QUESTIONS)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A picture."}]}
    return [
        [{"role": "user", "content": [parts[0], first]}],
        [{"role": "user", "content": [parts[1], first]}],
        [{"role": "user", "content": [parts[0], first, parts[1], second]}],
        [{"role": "user", "content": [parts[0], first]}, answer, {"role": "user", "content": [second]}],
        [{"role": "user", "content": [first]}, answer, {"role": "user", "content": [parts[1], second]}],
        [{"role": "user", "content": [first]}],
    ]


def for_transformers(messages):
    def rename(part):
        return {"type": "image", "image": part["image_pil"]} if part["type"] == "image_pil" else part

    return [message | {"content": [rename(part) for part in message["content"]]} for message in messages]


def compute(model, pixels, ids, is_image):
    """The embeddings of images [N, Q, L], and of a prompt [T, L] with them in it; runs in vLLM's worker process."""
    parameter = next(model.parameters())
    embeds = model.embed_multimodal(pixel_values=pixels.to(parameter))
    places = {"multimodal_embeddings": list(embeds), "is_multimodal": is_image.to(parameter.device)}
    return embeds.tolist(), model.embed_input_ids(ids.to(parameter.device), **places).tolist()


@torch.no_grad()
def test_embeddings(llm, blip2, processor, images):
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    text = processor.tokenizer.bos_token + "a <image> b <image> c"
    ids = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    is_image = ids == processor.image_token_id
    ((found, merged),) = llm.apply_model(functools.partial(compute, pixels=pixels, ids=ids, is_image=is_image))
    expected = blip2.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.tensor(found), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(merged), embed(blip2, ids, pixels), atol=2e-4, rtol=0)


def embed(blip2, ids, pixels):
    """What the language model of transformers' class is given, [T, L]; its ``generate`` takes one image per prompt."""
    embeds = blip2.get_input_embeddings()(ids)
    if pixels is not None:
        embeds[ids == blip2.config.image_token_id] = blip2.get_image_features(pixels).pooler_output.flatten(0, 1)
    return embeds


@torch.no_grad()
def test_prompts_and_greedy_answers(llm, blip2, processor, images):
    from vllm import SamplingParams

    for messages in conversations(images):
        inputs = processor.apply_chat_template(for_transformers(messages), **SETTINGS)
        ids = inputs["input_ids"][0]
        embeds, ends = embed(blip2, ids, inputs.get("pixel_values")), blip2.config.text_config.eos_token_id
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ends}
        expected = blip2.language_model.generate(inputs_embeds=embeds[None], **settings)[0].tolist()
        (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
        assert output.prompt_token_ids == ids.tolist()
        assert list(output.outputs[0].token_ids) == expected

"""Prompts and pixels by vLLM's processing functions equal those of transformers."""

import pytest
import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

PROMPTS = {
    "one image": "<s>Before. ###Human: <Img><image></Img> What is it?###Assistant:",
    "image first": "<image> What is it?",
    "image last": "What is <image>",
    "two images": "<s>One: <Img><image></Img> two: <Img><image></Img>, equal?",
    "two images without text between": "<s><image><image>x",
    "three images, one of them twice": "<s>a <image> b <image> c <image> d",
}


@pytest.fixture(scope="module")
def vllm_processor(folder):
    load_general_plugins()
    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(folder, dtype="float32"))


def apply(vllm_processor, prompt, images):
    return vllm_processor(prompt, vllm_processor.info.parse_mm_data({"image": images}))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_ids_places_and_pixels(vllm_processor, processor, images, prompt):
    images = [*images, images[0]][: prompt.count("<image>")]
    found = apply(vllm_processor, processor.tokenizer(prompt, add_special_tokens=False).input_ids, images)
    expected = processor(text=prompt, images=images, add_special_tokens=False, return_tensors="pt")
    ids = expected["input_ids"][0].tolist()
    assert found["prompt_token_ids"] == ids
    places = found["mm_placeholders"]["image"]
    marked = [i for place in places for i in range(place.offset, place.offset + place.length)]
    token, length = processor.image_token_id, processor.num_additional_image_tokens + 1
    assert marked == [i for i, number in enumerate(ids) if number == token] and {p.length for p in places} == {length}
    pixels = torch.stack([item["pixel_values"].data for item in found["mm_kwargs"]["image"]])
    assert pixels.equal(expected["pixel_values"])


@pytest.mark.parametrize("prompt", ["no image", "<image> and <image>"])
def test_other_numbers_of_image_tokens_are_refused(vllm_processor, images, prompt):
    with pytest.raises(ValueError, match=rf"has {prompt.count('<image>')} times <image> for 1 images"):
        apply(vllm_processor, prompt, images[:1])

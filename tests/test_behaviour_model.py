"""What the model and its image processors do, through the public API alone."""

import random

import numpy
import pytest
import torch
from golden_data import TINY, read_tensors
from PIL import Image
from safetensors.torch import load_file, save_file

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.models import MiniGPT4

IMAGES = read_tensors("vision")["image"]
# The published constants (OpenAI's CLIP), written out: the code's own would hide a mistake.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = "###Human: {} ###Assistant: "


@pytest.fixture
def build(tiny_config):
    def from_config(**changes):
        return MiniGPT4.from_config(tiny_config | {"llm_dtype": "fp32"} | changes, device=torch.device("cpu"))

    return from_config


def loss_of(model, *captions):
    with torch.no_grad():
        return model({"image": IMAGES[: len(captions)], "text_input": list(captions)})["loss"].item()


def test_every_prompt_of_the_list_occurs_in_training(build, tmp_path):
    prompts = [
        f"<Img><ImageHere></Img> {text}" for text in ("Describe it.", "What is it?", "Why?", "Tell me more now.")
    ]
    for i, lines in enumerate([*([prompt] for prompt in prompts), prompts]):
        (tmp_path / f"{i}.txt").write_text("\n".join(lines))
    alone = [
        loss_of(build(prompt_path=str(tmp_path / f"{i}.txt"), prompt_template=TEMPLATE).train(), "a dog")
        for i in range(len(prompts))
    ]
    assert min(abs(a - b) for i, a in enumerate(alone) for b in alone[:i]) > 1e-3  # a prompt shows in the loss
    model = build(prompt_path=str(tmp_path / "4.txt"), prompt_template=TEMPLATE).train()
    random.seed(0)
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        loss = loss_of(model, "a dog")
        (prompt,) = (i for i, expected in enumerate(alone) if abs(loss - expected) < 1e-4)
        seen.add(prompt)
    assert seen == {0, 1, 2, 3}


def test_max_txt_len_cuts_the_targets(build):
    short, long = build(max_txt_len=5), build()
    count = len(short.llama_tokenizer("a dog sits", add_special_tokens=False).input_ids)
    assert count >= 5
    texts = "a dog sits in the grass", "a dog sits on a red chair"
    assert loss_of(short, texts[0]) == pytest.approx(loss_of(short, texts[1]), abs=1e-6)
    assert abs(loss_of(long, texts[0]) - loss_of(long, texts[1])) > 1e-2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_unfrozen_vision_tower_keeps_its_float32_weights(build, precision):
    vit = build(freeze_vit=False, vit_precision=precision).visual_encoder.state_dict()
    frozen = build(vit_precision=precision).visual_encoder.state_dict()
    published = load_file(TINY / "eva_vit.safetensors")
    names = [name for name in vit if name in published and name.endswith(".weight") and vit[name].ndim > 1]
    assert len(names) >= 12
    for name in names:
        assert vit[name].dtype == torch.float32 and torch.equal(vit[name], published[name]), name
    assert not all(torch.equal(frozen[name].float(), published[name]) for name in names)  # which does show the rounding


def test_the_dropout_of_an_unfrozen_q_former_is_random_in_training(build):
    model = build(freeze_qformer=False).train()
    assert not torch.equal(model.encode_img(IMAGES)[0], model.encode_img(IMAGES)[0])
    model.eval()
    assert torch.equal(model.encode_img(IMAGES)[0], model.encode_img(IMAGES)[0])
    frozen = build().train()
    assert torch.equal(frozen.encode_img(IMAGES)[0], frozen.encode_img(IMAGES)[0])


STRAY = [
    "Qformer.bert.pooler.dense.weight",
    "Qformer.bert.embeddings.token_type_embeddings.weight",
    "Qformer.bert.encoder.layer.0.intermediate_extra.dense.weight",
    "Qformer.bert.encoder.layer.0.attention.self.distance_embedding.weight",
    "Qformer.bert.encoder.layer.9.attention.self.query.weight",
    "Qformer.extra.weight",
    "ln_vision.extra",
    "ln_vision_2.weight",
    "query_tokens_2",
    "t5_projection.weight",
]


@pytest.mark.parametrize("name", STRAY)
def test_a_stray_key_beside_the_q_former_is_refused(build, tmp_path, name):
    save_file(load_file(TINY / "qformer.safetensors") | {name: torch.ones(2)}, tmp_path / "qformer.safetensors")
    with pytest.raises(UserError) as error:
        build(q_former_model=str(tmp_path / "qformer.safetensors"))
    assert name in str(error.value) and "model.q_former_model" in str(error.value)


def test_the_keys_of_the_text_branch_are_ignored(build, tmp_path):
    """The counterpart: refusing every key that is not used would refuse the published file."""
    text_branch = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(5, 48),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(96, 48),
        "Qformer.bert.encoder.layer.3.output.dense.bias": torch.ones(48),
        "Qformer.cls.predictions.bias": torch.ones(5),
        "t5_proj.weight": torch.ones(4, 48),
    }
    save_file(load_file(TINY / "qformer.safetensors") | text_branch, tmp_path / "qformer.safetensors")
    with torch.no_grad():
        other = build(q_former_model=str(tmp_path / "qformer.safetensors")).encode_img(IMAGES)[0]
        assert torch.equal(other, build().encode_img(IMAGES)[0])


# processors


def processor(name, **settings):
    return registry.get_processor_class(name).from_config({"name": name, **settings})


@pytest.mark.parametrize("name", ["blip2_image_train", "blip2_image_eval"])
@pytest.mark.parametrize("level", [0, 77, 255])
def test_pixels_are_normalised_by_the_published_constants(name, level):
    """Of a plain image nothing is interpolated, so that a mean or deviation that is 1 % off shows."""
    pixels = processor(name, image_size=28)(Image.new("RGB", (60, 40), (level,) * 3))
    assert pixels.shape == (3, 28, 28) and pixels.dtype == torch.float32
    for channel in range(3):
        expected = (level / 255 - MEAN[channel]) / STD[channel]
        assert pixels[channel].flatten().tolist() == pytest.approx([expected] * 28**2, abs=2e-5)


def test_channels_are_not_mixed_up():
    pixels = processor("blip2_image_eval", image_size=28)(Image.new("RGB", (30, 30), (255, 0, 0)))
    values = pixels.mean((1, 2)).tolist()
    assert values == pytest.approx([((c == 0) - MEAN[c]) / STD[c] for c in range(3)], abs=2e-5)


@pytest.fixture
def sample_of(tmp_path):
    """The image of a sample, as a tensor, from a JPEG of noise, read by the builder of cc_sbu_align."""

    def make(width, height, name, draft):
        folder = tmp_path / f"{width}x{height}"
        if not folder.exists():
            (folder / "image").mkdir(parents=True)
            noise = numpy.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
            Image.fromarray(noise).save(folder / "image" / "1.jpg", quality=95)
            (folder / "filter_cap.json").write_text('{"annotations": [{"image_id": "1", "caption": "noise"}]}')
        settings = {"name": name, "image_size": 64, "draft": draft}
        section = {"build_info": {"storage": str(folder)}, "vis_processor": {"train": settings}}
        builder = registry.get_builder_class("cc_sbu_align")(section)
        torch.manual_seed(1)
        image = builder.build_datasets()["train"][0]["image"]
        return torch.as_tensor(numpy.asarray(image)).float()

    return make


@pytest.mark.parametrize(
    ("width", "height", "name"),
    [
        (512, 100, "blip2_image_eval"),  # half of the height would be enlarged
        (100, 512, "blip2_image_eval"),
        (512, 100, "blip2_image_train"),
        (100, 512, "blip2_image_train"),
        (150, 150, "blip2_image_train"),  # the smallest crop of half the size would be enlarged
    ],
)
def test_a_draft_decoded_image_is_never_enlarged(sample_of, width, height, name):
    """What cannot be halved without enlarging a part of it is decoded in full: the same pixels as without draft."""
    assert torch.equal(sample_of(width, height, name, draft=True), sample_of(width, height, name, draft=False))


@pytest.mark.parametrize("name", ["blip2_image_train", "blip2_image_eval"])
def test_a_large_image_is_draft_decoded(sample_of, name):
    large = sample_of(600, 500, name, draft=True), sample_of(600, 500, name, draft=False)
    assert large[0].shape != large[1].shape or not torch.equal(*large)

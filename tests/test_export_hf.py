"""A model as a folder of transformers' BLIP-2 classes: the same numbers, prompts and answers from the folder alone."""

import json
from dataclasses import replace
from pathlib import Path

import family
import pytest
import torch
from architectures import write_language_model
from conftest import TINY_CONFIG
from golden_data import TINY, read_tensors
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.templates import TEMPLATES
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models import MiniGPT4
from minigpt4.models.lora import lora_delta
from minigpt4.models.text_rows import IMAGE_TOKEN_INDEX
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor
from minigpt4.tools import export_hf, hf_folder

IMAGES = read_tensors("vision")["image"]
QUESTIONS = ("What is it?", "Is it red?")
TEMPLATE = {"prompt_template": "###Human: {} ###Assistant: ", "end_sym": "###"}
SETTINGS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def section(**changes):
    return read_section(ModelConfig, TINY_CONFIG | TEMPLATE | changes, "model")


def export(folder, image_processor=None, dtype=torch.float32, **changes):
    export_hf.export(section(**changes), folder, image_processor or Blip2ImageEvalProcessor(28), dtype)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def own(build):
    return build(**TEMPLATE).eval()


@pytest.fixture(scope="module")
def blip2(folder):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    return model.eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, backend="pil")


@torch.no_grad()
def test_features_and_logits_are_equal(own, blip2):
    expected = own.encode_img(IMAGES)[0]
    torch.testing.assert_close(blip2.get_image_features(IMAGES).pooler_output, expected, atol=2e-4, rtol=0)
    ids = own.bos_ids + own.tokenize_prompt("###Human: <Img><ImageHere></Img> What? ###Assistant:")
    embeds = own.embed_inputs(torch.tensor([ids]), expected[:1])
    logits = own.llama_model(inputs_embeds=embeds).logits
    stock_ids = torch.tensor([[blip2.config.image_token_id if i < 0 else i for i in ids]])
    stock = blip2(pixel_values=IMAGES[:1], input_ids=stock_ids, attention_mask=torch.ones_like(stock_ids)).logits
    rows = logits.shape[-1]
    torch.testing.assert_close(stock[..., :rows], logits, atol=2e-3, rtol=0)
    assert (stock[..., rows:] < stock.max(-1, keepdim=True).values).all()  # <image> is never the answer


def test_pixels_prompts_and_answers_are_equal_over_two_turns(own, blip2, processor):
    image, images = Image.linear_gradient("L").convert("RGB"), []
    chat = Chat(own, Blip2ImageEvalProcessor(28), template=own.template)
    conv, messages = own.template.copy(), []
    chat.upload_img(image, conv, images)
    for question in QUESTIONS:
        chat.ask(question, conv)
        content = [{"type": "text", "text": question}]
        messages.append(
            {"role": "user", "content": content if messages else [{"type": "image", "image": image}, *content]}
        )
        waiting = conv.copy()
        waiting.append_message(conv.roles[1], None)
        expected = own.bos_ids + own.tokenize_prompt(waiting.get_prompt())
        inputs = processor.apply_chat_template(messages, **SETTINGS)
        found = inputs["input_ids"][0].tolist()
        assert [IMAGE_TOKEN_INDEX if i == blip2.config.image_token_id else i for i in found] == expected
        torch.testing.assert_close(inputs["pixel_values"][0], chat.vis_processor(image), atol=1e-6, rtol=0)
        text, ids = chat.answer(conv, images, do_sample=False, max_new_tokens=12)
        stop = {"stop_strings": [conv.stop_string], "tokenizer": processor.tokenizer}
        answer = blip2.generate(**inputs, max_new_tokens=12, do_sample=False, **stop)[0, len(found) :].tolist()
        assert answer == ids.tolist()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


@pytest.mark.parametrize("member", [None, "vicuna0"])
def test_generation_settings_and_the_example_of_the_card_are_those_of_the_chat(member, own, folder, tmp_path):
    size = 28
    if member:
        own, size, folder = family.shared(member), family.DIMS["image_size"][member], tmp_path / "model"
        cfg = read_section(ModelConfig, family.section(member), "model")
        export_hf.export(cfg, folder, Blip2ImageEvalProcessor(size), torch.float32)
    chat, tokenizer = Chat(own, Blip2ImageEvalProcessor(size), template=own.template), own.llama_tokenizer
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings.pop("repetition_penalty", 1.0) == chat.with_defaults(GenerationOptions()).repetition_penalty
    assert (settings.pop("bos_token_id"), settings.pop("pad_token_id")) == (1, tokenizer.eos_token_id)
    ends = {i for i in range(len(tokenizer)) if own.template.stop_string in tokenizer.decode([i])}
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    assert settings.pop("eos_token_id") == text_config["eos_token_id"] == [2, *sorted(ends - {2})]
    assert not settings  # greedy unless asked otherwise, and no limit, which vLLM would take for that of all requests

    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python").replace("=300", "=40")
    for number, question in ((0, QUESTIONS[0]), (1, QUESTIONS[1]), (2, QUESTIONS[0])):
        conv, images, image = own.template.copy(), [], str(family.picture(number))
        chat.upload_img(image, conv, images)
        chat.ask(question, conv)
        values = {"FOLDER": str(folder)}
        exec(code.replace("picture.png", image).replace("Describe this image in detail.", question), values)
        ids = values["ids"][0, values["inputs"]["input_ids"].shape[1] :].tolist()
        assert ids == chat.answer(conv, images, do_sample=False, max_new_tokens=40)[1].tolist()


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_every_template_gives_the_same_prompts(own, tmp_path, monkeypatch, name):
    monkeypatch.setitem(own.__dict__, "template", TEMPLATES[name] if name else own.template)
    processor, _ = hf_folder.write_processor(tmp_path, TINY / "llama", own, Blip2ImageEvalProcessor(28))
    hf_folder.check_prompts(processor, own, processor.image_token_id)
    text = processor.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert text.startswith("<s>")  # which vLLM's chats do not add


@pytest.mark.parametrize("begin", ["{{ bos_token }}", ""])
def test_the_own_template_of_a_tokenizer(own, tmp_path, monkeypatch, begin):
    text = begin + "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    text += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(own.llama_tokenizer, "chat_template", text)
    monkeypatch.setattr(own, "prompt_template", "")
    monkeypatch.delitem(own.__dict__, "template", raising=False)
    monkeypatch.setitem(own.__dict__, "template", own.template)
    processor, _ = hf_folder.write_processor(tmp_path, TINY / "llama", own, Blip2ImageEvalProcessor(28))
    hf_folder.check_prompts(processor, own, processor.image_token_id)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert processor.apply_chat_template(messages, tokenize=False) == "<s><system>S\n<user>Q\n"


def test_the_folder_is_complete(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [export_hf.ARCHITECTURE]
    assert f'"{export_hf.ARCHITECTURE}"' in Path("plugins/vllm/minigpt4_vllm/__init__.py").read_text()
    assert "_name_or_path" not in config["text_config"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["legacy"] is True
    card = (folder / "README.md").read_text()
    assert "Answers end by themselves" in card and "use_fast" not in card  # which loads another tokenizer, too
    assert '.removesuffix("###")' in card  # which transformers, unlike vLLM, leaves at the end


def test_the_card_tells_how_answers_end_and_what_the_run_recorded(own, tmp_path, monkeypatch):
    monkeypatch.setitem(own.__dict__, "template", replace(TEMPLATES["vicuna_v0"], sep="@~@"))
    torch.save({"config": {"datasets": {"cc_sbu_align": {}}}, "state": {"step": 1000}}, tmp_path / "c.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 4, "val_loss": 0.5}\n')
    hf_folder.write_card(tmp_path, own, own.template, tmp_path / "c.pth", own.eos_ids)
    card = (tmp_path / "README.md").read_text()
    assert 'stop_strings=["@~@"], tokenizer=processor.tokenizer' in card and '"val_loss": 0.5' in card
    assert "cc_sbu_align" in card and "1,000" in card


def test_lora_is_merged_and_tied_embeddings_get_a_row_each(tmp_path):
    llm = write_language_model(tmp_path / "llm", "llama3")
    settings = {"llama_model": str(llm), "lora_r": 2, "ckpt": None}
    model = MiniGPT4.from_config(section(**settings), "cpu")
    state = {name: torch.randn_like(value) for name, value in model.trainable_state_dict().items()}
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    out = export(tmp_path / "out", dtype=torch.bfloat16, **settings | {"ckpt": str(tmp_path / "checkpoint.pth")})
    tensors, base = load_file(out / "model.safetensors"), load_file(llm / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (state[f"llama_model.base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = base[f"{name}.weight"] + lora_delta(a, b, model.lora.scaling)
    assert tensors[f"language_model.{name}.weight"].equal(merged.bfloat16())
    assert len(tensors["language_model.lm_head.weight"]) == 601 and tensors["query_tokens"].dtype == torch.float32
    blip2, report = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report.values()) and blip2.dtype == torch.bfloat16


def test_what_stock_classes_cannot_express_is_refused(tmp_path):
    class Other(Blip2ImageEvalProcessor):
        pass

    with pytest.raises(UserError, match=r"has_qformer is False.*no class"):
        export(tmp_path / "a", has_qformer=False)
    with pytest.raises(UserError, match="a Other; transformers"):
        export(tmp_path / "b", Other(28))
    llm = write_language_model(tmp_path / "llm", "qwen2")  # whose class encodes this tokenizer's texts in another way
    with pytest.raises(UserError, match="encodes prompts of this template with other ids"):
        export(tmp_path / "c", llama_model=str(llm), ckpt=str(TINY / "minigpt4_ckpt.pth"))
    assert [file.name for file in tmp_path.iterdir()] == ["llm"]


def test_the_command_reports_a_folder_that_exists(tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["--cfg-path", "eval_configs/quickstart_eval.yaml", "--ckpt", "x.pth", "--out", str(tmp_path)]
    assert export_hf.main(arguments) == 1 and "is not an empty folder" in capsys.readouterr().err

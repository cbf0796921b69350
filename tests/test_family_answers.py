"""The later family: answers of ``generate``, ranks of candidates, and the names of LoRA in checkpoints."""

import pytest
import torch
from family import FAMILY, MEMBERS, images, load, recorded, section, shared, tensors
from golden_data import close, read_json

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat
from minigpt4.models import MiniGPT4
from minigpt4.models.lora import merge_lora

ROWS = [(member, row) for member in MEMBERS for row in recorded(member, "generate")["rows"]]
DEFAULT_NAMES = FAMILY / "v2" / "minigptv2_ckpt_peft_default_names.pth"


def name_of(value):
    return value if isinstance(value, str) else value["name"]


def up_to(ids, end):
    """Ids up to the end token, behind which rows are filled."""
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize(("member", "row"), ROWS, ids=name_of)
def test_generate(member, row):
    model = shared(member)
    if row["name"] == "no_images":
        with pytest.raises(UserError, match="0 images for 1 texts"):
            model.generate(None, ["<ImageHere>"])
        return
    pixels = [images(member, numbers if isinstance(numbers, list) else [numbers]) for numbers in row["images"]]
    pixels = torch.stack(pixels) if row["name"] == "five_dimensional" else torch.cat(pixels)
    if "error" in row:
        with pytest.raises(UserError, match="2 image placeholders, but 1 images"):
            model.generate(pixels, row["texts"], **row["args"])
        return
    end = row.get("eos_token_id", 2)
    ids = model.generate_ids(pixels, row["texts"], eos_token_id=end, **row["args"])
    assert [up_to(own, end) for own in ids] == [up_to(own, end) for own in row["raw_ids"]]
    if end == 2:
        assert model.generate(pixels, row["texts"], **row["args"]) == row["answers"]


@pytest.mark.parametrize("member", MEMBERS)
def test_inputs_of_the_language_model(member, monkeypatch):
    model, golden, seen = shared(member), tensors(member, "generate"), {}
    monkeypatch.setattr(model.llama_model, "generate", lambda *_, **given: seen.update(given) or torch.zeros(1, 1))
    for row in recorded(member, "generate")["rows"]:
        if row["name"] in ("batch", "single"):
            model.generate_ids(images(member, row["images"]), row["texts"])
            mask = golden[f"{row['name']}.attention_mask"]
            assert torch.equal(seen["attention_mask"].cpu(), mask)
            assert close(seen["inputs_embeds"][mask == 1], golden[f"{row['name']}.inputs_embeds"][mask == 1], 5e-5)


@pytest.mark.parametrize("member", MEMBERS)
def test_ids_to_answers(member):
    for row in recorded(member, "generate")["postprocess"]:
        assert shared(member).clean_answer(row["raw_ids"]) == row["answer"]


@pytest.mark.parametrize("member", MEMBERS)
def test_multi_select(member, monkeypatch):
    model = shared(member)
    for row in recorded(member, "multi_select")["rows"]:
        monkeypatch.setattr(model, "chat_template", row.get("chat_template") or False)
        arguments = images(member, row["images"]), row["texts"], row["candidates"]
        assert close(model.candidate_losses(*arguments), torch.tensor(row["losses"]), 1e-5)
        assert model.multi_select(*arguments, num_cand=row["num_cand"]) == row["ranks"]


ASKED = "<Img><ImageHere></Img> what?"


@pytest.mark.parametrize(
    ("texts", "candidates", "words"),
    [
        (["what?"], [["x"], ["y"]], "what.*<ImageHere> once"),
        ([f"<ImageHere>{ASKED}"], [["x"], ["y"]], "<ImageHere> once"),
        ([ASKED], [["x"], []], r"1 texts, 1 images and candidates for \[1, 0\] texts"),
        ([ASKED, ASKED], [["x", "y"]], "2 texts, 1 images"),
        ([ASKED], [], "candidates for"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(texts, candidates, words):
    """The reference raises where an image has no placeholder, too."""
    with pytest.raises(UserError, match=words):
        shared("v2").multi_select(images("v2", [0]), texts, candidates)


def test_no_texts_have_no_answers():
    assert shared("v2").generate(images("v2", [0]), []) == []


def loss_of(model):
    case = recorded("v2", "forward")["instruction"]
    samples = case["samples"] | {"image": images("v2", case["samples"]["image"]["images"])}
    with torch.no_grad():
        return model(samples)["loss"].item(), case["loss"][0]


def test_both_names_of_peft_are_read_and_merged():
    model = load("v2", ckpt=str(DEFAULT_NAMES))
    assert loss_of(model)[0] == pytest.approx(loss_of(model)[1], abs=1e-5)
    facts = read_json("facts.json", FAMILY)["v2_default_names_loaded_by_the_reference"]
    assert abs(facts["loss"] - loss_of(model)[1]) > 0.1  # the reference ignores these names in silence
    merge_lora(model.llama_model, model.lora)
    for name, value in tensors("v2", "lora_merged").items():
        own = model.llama_model.get_parameter(f"model.{name.replace('merged_weight', 'weight')}")
        assert (own.cpu() - value).norm() < 1e-5 * value.norm(), name
    assert loss_of(model)[0] == pytest.approx(loss_of(model)[1], abs=1e-5)


def written(folder, change):
    content = torch.load(FAMILY / "v2" / "minigpt_ckpt.pth", weights_only=True)
    change(content["model"])
    torch.save(content, folder / "ckpt.pth")
    return str(folder / "ckpt.pth")


def leave_out_some(state):
    for name in [name for name in state if ".lora_B" in name][:2]:
        del state[name]


def widen(state):
    for name in [name for name in state if ".lora_A" in name]:
        state[name] = torch.ones(4, 64)


def leave_out_all(state):
    for name in [name for name in state if ".lora_" in name]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (leave_out_some, "2 of 12 tensors are missing"),
        (widen, "trained with another language model"),
        (leave_out_all, "model.ckpt holds no LoRA weights"),
        (
            lambda state: state.update({"llama_model.rotary_emb.inv_freq": torch.ones(2)}),
            "",
        ),
    ],
    ids=["partial", "another base", "none", "buffers"],
)
def test_lora_is_counted(tmp_path, change, words, caplog):
    path = written(tmp_path, change)
    if "no LoRA" in words:  # as of stage 1, from which a training may start; a chat needs trained ones
        model = load("v2", ckpt=path)
        assert "belongs to the Llama-2 variant" in caplog.text
        for use in (lambda: merge_lora(model.llama_model, model.lora), lambda: Chat(model, None)):
            with pytest.raises(UserError, match=words):
                use()
        return
    if not words:
        assert MiniGPT4.from_config(section("v2", ckpt=path), device="meta")
        return
    with pytest.raises(UserError, match=words) as error:
        MiniGPT4.from_config(section("v2", ckpt=path), device="meta")
    assert path in str(error.value)

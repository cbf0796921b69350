"""Conversations about images: what is trained, that a chat shows the same, and their data sets."""

import queue
from pathlib import Path

import pytest
import torch
from data_samples import EVAL, make_loader, picture
from golden_data import TINY, read_tensors

from minigpt4.common.errors import UserError
from minigpt4.common.templates import TEMPLATES
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.datasets.datasets import ConversationDataset
from minigpt4.datasets.datasets.conversations import DataUrl, Dialogue, Pair
from minigpt4.datasets.datasets.rows import Location, read_row
from minigpt4.datasets.loader import eval_batches
from minigpt4.models.text_rows import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from minigpt4.serve.engine import Engine
from minigpt4.serve.request_queue import Request

IMAGES = read_tensors("vision")["image"]
A, B, HERE = "a.jpg", "b.jpg", "<ImageHere>"
PARTS = [{"type": "image_url", "image_url": {"url": A}}, {"type": "text", "text": "What?"}]


@pytest.fixture(params=["vicuna_v0", "vicuna_v1", None])
def talking(request, build):
    """A model whose chats have a template: a named one, or that of the training prompts."""
    name = request.param
    form = {} if name else {"prompt_template": "Q {} A ", "end_sym": "</s>"}
    return build(conversation=name, **form)


CONVERSATION = [(f"{HERE}\nWhat is it?", "A red dog."), ("Sure?", "Yes."), (f"And {HERE} this?", "A cat & <b>.")]


def chat_ids(model, turns, system=""):
    """The ids of a chat's prompt after the same turns."""
    chat, images = Chat(model, None, template=model.template), []
    conv = chat.template.copy()
    conv.add_system(system)
    for question, answer in turns:
        for i, text in enumerate(question.split(HERE)):
            if i:
                chat.upload_img(IMAGES[0], conv, images)
            if text.strip():
                chat.ask(text.strip(), conv)
        conv.append_message(conv.roles[1], answer)
    return model.bos_ids + model.tokenize_prompt(conv.get_prompt())


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_row_is_what_a_chat_shows(talking, system):
    row = talking.tokenize_conversation(CONVERSATION, system)
    assert row.ids == chat_ids(talking, CONVERSATION, system)[: len(row.ids)] and not row.is_truncated
    targets = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
    assert [row.labels[i] for i in targets] == [row.ids[i] for i in targets]
    texts, last = [[]], targets[0]
    for i in targets:
        texts += [[]] if i > last + 1 else []
        texts[-1].append(row.ids[i])
        last = i
    decoded = [talking.llama_tokenizer.decode(ids).strip() for ids in texts]
    stop = talking.template.stop_string.strip()
    assert [text.removesuffix(stop).strip() for text in decoded] == [answer for _, answer in CONVERSATION]
    assert all(text.endswith(stop) for text in decoded) and last == len(row.ids) - 1


def test_the_api_asks_as_was_trained(model):
    """The prompt of a request has the tokens of a row with the same messages up to its last answer."""
    parts = [*PARTS, {"type": "text", "text": "And why?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    row = read_row({"messages": [*messages, {"role": "assistant", "content": "A dog."}]}, Location("x", Path()))
    labels = model.tokenize_conversation(row.turns, row.system).labels
    engine, updates = Engine(Chat(model, None), max_length=400, max_batch_tokens=400), queue.Queue()
    asked = [("system", ["Be brief."]), ("user", [IMAGES[0], "What?", "And why?"])]
    engine.submit(Request(asked, GenerationOptions(do_sample=False, max_new_tokens=1), updates.put))
    answer = updates.get(timeout=60)
    engine.close()
    assert answer.prompt_tokens == next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)


@pytest.mark.parametrize("limit", range(10, 230, 7))
def test_truncation_never_splits_an_image(model, monkeypatch, limit):
    whole = model.tokenize_conversation(CONVERSATION)
    monkeypatch.setattr(model, "max_context_len", limit)
    row = model.tokenize_conversation(CONVERSATION)
    assert len(row.ids) <= limit and row.is_truncated == (len(whole.ids) > limit)
    assert row.ids.count(IMAGE_TOKEN_INDEX) in (0, 8, 16)
    assert row.ids == whole.ids[: len(row.ids)] and len(row.labels) == len(row.ids)
    num_turns = [len(model.tokenize_conversation(CONVERSATION[:n]).ids) for n in (1, 2, 3)]
    if limit >= num_turns[0]:
        assert len(row.ids) in num_turns


@pytest.mark.parametrize("name", ["max_context_len", "max_txt_len"])
def test_truncation_of_the_later_family_never_splits_an_image(build, name):
    model = build(conversation="minigpt_v2", prompt_template="[INST] {} [/INST]", end_sym="</s>", max_txt_len=400)
    for limit in range(2, 60):
        setattr(model, name, limit)
        assert model.tokenize_conversation(CONVERSATION).ids.count(IMAGE_TOKEN_INDEX) in (0, 8, 16)


def batch_of(turns_of_rows, model):
    counts = [sum(question.count(HERE) for question, _ in turns) for turns in turns_of_rows]
    return {
        "image": IMAGES[torch.arange(sum(counts)) % len(IMAGES)],
        "num_images": counts,
        "text_input": [""] * len(counts),
        "conversation": [{"turns": turns} for turns in turns_of_rows],
    }


def test_rows_with_any_number_of_images_train_together(model):
    rows = [CONVERSATION, CONVERSATION[1:2], CONVERSATION[:1]]
    model.zero_grad()
    output = model(batch_of(rows, model))
    output["loss"].backward()
    assert model.llama_proj.weight.grad.norm() > 0 and output["num_truncated"] == 0
    alone = [model(batch_of([row], model)) for row in rows]
    # The images of the third row follow those of the first, so it is compared with that image.
    third = batch_of(rows[2:], model) | {"image": IMAGES[2:3]}
    alone[2] = model(third)
    total = sum(part["loss"].item() * part["num_targets"] for part in alone)
    assert output["loss"].item() == pytest.approx(total / output["num_targets"], rel=1e-5)
    model.zero_grad()


def test_rows_without_an_image_give_gradients_of_zero(build):
    model = build(freeze_qformer=False)
    model(batch_of([CONVERSATION[1:2]], model))["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained if p is not None) and len(trained) > 10


def test_images_of_turns_that_were_left_out_are_not_shown(model, monkeypatch):
    monkeypatch.setattr(model, "max_context_len", len(model.tokenize_conversation(CONVERSATION).ids) - 1)
    short = batch_of([CONVERSATION, CONVERSATION[:1]], model)
    output = model(short)
    expected = batch_of([CONVERSATION[:2], CONVERSATION[:1]], model) | {"image": IMAGES[[0, 2]]}
    assert output["num_truncated"] == 1 and torch.equal(output["loss"], model(expected)["loss"])


def test_the_mean_of_no_target_is_no_number(model, monkeypatch):
    monkeypatch.setattr(model, "max_context_len", 20)
    assert model(batch_of([CONVERSATION], model))["loss"].isnan()


# data sets


@pytest.fixture
def rows(tmp_path):
    for name in (A, B):
        (tmp_path / name).write_bytes(picture(ord(name[0])))
    one = Dialogue((tmp_path / A, tmp_path / B), ((f"{HERE} or {HERE}?", "The first."),))
    return [one, Dialogue((), (("Hi", "Ho"),), "S"), Pair(tmp_path / A, "c", "What?"), Pair(tmp_path / B, "d")]


def test_batches_of_conversations_and_pairs(rows, tmp_path):
    dataset = ConversationDataset("x", rows, EVAL)
    (batch,) = eval_batches("x", dataset, batch_size=4, num_workers=0, seed=0)
    assert batch["image"].shape == (4, 3, 8, 8) and batch["num_images"] == [2, 0, 1, 1]
    assert batch["instruction"] == [None, None, "What?", None]
    assert [c and c["system"] for c in batch["conversation"]] == ["", "S", None, None]
    (tmp_path / B).unlink()
    batches = eval_batches("x", dataset, batch_size=4, num_workers=0, seed=0)
    assert [batch["num_images"] for batch in batches] == [[0, 1]] and batches.skipped == {"missing image file": 2}
    only_text = ConversationDataset("x", rows[1:2], EVAL)
    assert next(iter(eval_batches("x", only_text, 1, 0, 0)))["image"].shape == (0, 3, 8, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_exact_resume(rows, num_workers):
    def loader():
        data = {"x": ConversationDataset("x", rows, EVAL)}
        return make_loader(data, batch_size=3, iters_per_epoch=6, num_workers=num_workers)

    first = loader()
    batches = list(first.iter_epoch(0))
    partly, position = loader(), loader()
    left = partly.iter_epoch(0)
    for _ in range(2):
        next(left)
    position.load_state_dict([partly.state_dict()], 0, 2)
    rest = list(position.iter_epoch(0, 2))
    assert [batch["text_input"] for batch in rest] == [batch["text_input"] for batch in batches[2:]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, batches[2:], strict=True))


def test_a_damaged_data_url_is_skipped():
    dataset = ConversationDataset("x", [Dialogue((DataUrl("data:image/png;base64,###"),), ((HERE, "a"),))], EVAL)
    batches = eval_batches("x", dataset, 1, 0, 0)
    assert list(batches) == [] and batches.skipped == {"unreadable image": 1}


def test_templates_are_known(model):
    assert TINY.is_dir() and model.template is TEMPLATES["vicuna_v0"]
    with pytest.raises(UserError, match="once for each image"):
        model(batch_of([CONVERSATION], model) | {"image": IMAGES[:1]})

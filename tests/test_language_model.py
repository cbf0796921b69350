"""Any causal LM of transformers: packed training rows and chats equal plain transformers, row by row."""

import inspect
import json
from random import Random

import pytest
import torch
from architectures import ARCHITECTURES, OWN_ATTENTION_WEIGHTS, write_language_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

from minigpt4.common.errors import UserError
from minigpt4.models.growing_cache import MIN_ROOM, copy_cache, new_cache
from minigpt4.models.language_model import (
    decoder_layers,
    last_hidden_states,
    lm_head,
    load_language_model,
    next_token_logits,
)
from minigpt4.models.packed_attention import PackedBatch, next_token_loss, recompute_layers

LENGTHS, PREFIX = [4, 9, 2], [1, 5, 9]


@pytest.fixture(params=ARCHITECTURES)
def both(request, tmp_path):
    """Plain transformers with eager attention, and the model as it is loaded here."""
    folder = write_language_model(tmp_path, request.param)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return plain.requires_grad_(False), load_language_model(folder, torch.float32)


def rows(llm, scale=0.5):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(length, llm.config.hidden_size, generator=generator) for length in LENGTHS]


def plain_loss(llm, embeds, targets, prefix):
    """Row by row: prefix and row through the whole model, the loss of every position of the row."""
    begin = llm.get_input_embeddings()(torch.tensor(prefix)) if prefix else embeds[0][:0]
    logits = [llm(inputs_embeds=torch.cat([begin, row])[None]).logits[0, len(prefix) :] for row in embeds]
    return cross_entropy(torch.cat(logits), targets)


@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no prefix"])
def test_packed_loss_and_gradients_equal_plain_transformers(both, prefix):
    plain, llm = both
    targets = torch.arange(sum(LENGTHS)) * 7 % 600
    expected_rows = [row.requires_grad_() for row in rows(plain)]
    expected = plain_loss(plain, expected_rows, targets, prefix)
    expected.backward()
    packed = torch.cat(rows(llm)).requires_grad_()
    embeds = torch.cat([llm.get_input_embeddings()(torch.tensor(prefix, dtype=torch.long)), packed])
    hidden = last_hidden_states(llm, embeds, PackedBatch(LENGTHS, len(prefix)))[len(prefix) :]
    loss = next_token_loss(hidden, lm_head(llm), targets, chunk=4)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(packed.grad, torch.cat([row.grad for row in expected_rows]), atol=1e-5, rtol=1e-4)


def test_a_cache_in_pieces_and_left_padding_equal_whole_rows(both):
    plain, llm = both
    generator = torch.Generator().manual_seed(2)
    embeds = 0.5 * torch.randn(3, 12, llm.config.hidden_size, generator=generator)
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in (12, 5, 8)])
    cache = new_cache()
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 12)):
            logits = next_token_logits(llm, embeds[:, start:end], mask[:, :end], cache)
        alone = [
            plain(inputs_embeds=row[None, 12 - n :]).logits[0, -1] for row, n in zip(embeds, (12, 5, 8), strict=True)
        ]
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 12


def next_token(llm, cache, rows=1):
    """One more token of each row, and its logits."""
    mask = torch.ones(rows, cache.get_seq_length() + 1, dtype=torch.long)
    embeds = torch.ones(rows, 1, llm.config.hidden_size, device=llm.device)
    return next_token_logits(llm, embeds, mask, cache)


def test_a_model_class_is_inspected_once(model, monkeypatch):
    """Not for each token."""
    llm, calls, signature = model.llama_model, [], inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda function: calls.append(function) or signature(function))
    cache = new_cache()
    for _ in range(5):
        next_token(llm, cache)
    assert sum(function in (llm.forward, type(llm).forward) for function in calls) <= 1


@torch.no_grad()
def test_tokens_are_written_into_the_cache_in_place(model):
    cache, llm = new_cache(), model.llama_model
    places = []
    for _ in range(MIN_ROOM + 8):
        next_token(llm, cache)
        places.append([layer.keys.data_ptr() for layer in cache.layers])
    assert len(set(map(tuple, places))) <= 3  # the first token, and two buffers


@torch.no_grad()
def test_a_growing_cache_is_what_transformers_own_one_is(model):
    """Through everything that is done to caches: rows are selected and repeated, tokens removed, parts replaced."""
    llm, random = model.llama_model, Random(0)
    caches = new_cache(), DynamicCache()
    num_rows = 3
    for _ in range(150):
        kind = random.choice(["token"] * 8 + ["crop", "select", "repeat", "left", "copy"])
        length = caches[0].get_seq_length()
        if kind == "crop" and length > 2:
            [cache.crop(-(length // 3)) for cache in caches]
        elif kind == "select" and num_rows > 1 and length:
            [cache.batch_select_indices(torch.arange(1, num_rows)) for cache in caches]
            num_rows -= 1
        elif kind == "repeat" and num_rows < 4 and length:
            [cache.batch_repeat_interleave(2) for cache in caches]
            num_rows *= 2
        elif kind == "left" and length > 2:
            for layer in (layer for cache in caches for layer in cache.layers):
                layer.keys, layer.values = layer.keys[..., 1:, :], layer.values[..., 1:, :]
        elif kind == "copy" and length:
            kept = copy_cache(caches[0])
            before = [layer.keys.clone() for layer in kept.layers]
            [next_token(llm, cache, num_rows) for cache in caches]
            assert all(torch.equal(layer.keys, old) for layer, old in zip(kept.layers, before, strict=True))
        logits = [next_token(llm, cache, num_rows) for cache in caches]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
    for ours, plain in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close((ours.keys, ours.values), (plain.keys, plain.values), atol=1e-5, rtol=1e-4)


def test_padded_rows_equal_packed_ones(both):
    _, llm = both
    batch, embeds = PackedBatch(LENGTHS), torch.cat(rows(llm))
    packed, padded = (last_hidden_states(llm, embeds, batch, is_packed) for is_packed in (True, False))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


def test_recomputed_layers_give_the_same_gradients(both):
    _, llm = both
    results = []
    for _ in range(2):
        embeds = torch.cat(rows(llm)).requires_grad_()
        lengths = [LENGTHS[0] - len(PREFIX), *LENGTHS[1:]]
        last_hidden_states(llm, embeds, PackedBatch(lengths, len(PREFIX))).square().sum().backward()
        results.append(embeds.grad)
        recompute_layers(decoder_layers(llm))
    torch.testing.assert_close(*results)


def test_attention_weights_are_given_on_request(both):
    plain, llm = both
    if llm.config.model_type in OWN_ATTENTION_WEIGHTS:
        return
    embeds = torch.cat(rows(llm))[None]
    with torch.no_grad():
        weights = llm(inputs_embeds=embeds, output_attentions=True).attentions
        expected = plain(inputs_embeds=embeds, output_attentions=True).attentions
    for given, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


def test_a_loss_in_chunks_is_the_plain_one():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(11, 6, requires_grad=True), torch.randn(20, 6), torch.randint(20, (11,))
    plain = cross_entropy(hidden @ weight.T, targets)
    (expected,) = torch.autograd.grad(plain, hidden)
    loss = next_token_loss(hidden, lambda part: part @ weight.T, targets, chunk=4)
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected)
    assert next_token_loss(hidden[:0], lambda part: part @ weight.T, targets[:0]).isnan()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "no_such_model"}, ("no_such_model",)),
        ({"model_type": "t5"}, ("cannot be loaded",)),
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers 1000000",)),
        ({"hidden_size": -3}, ("hidden_size", "-3")),
        ({"num_attention_heads": "two"}, ("num_attention_heads", "'two'")),
        ({"num_key_value_heads": 3}, ("does not match",)),
        ({"rope_scaling": {"type": "linear"}}, ("cannot be loaded",)),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, changes, words):

    folder = write_language_model(tmp_path, "llama2")
    file = folder / "config.json"
    content = json.loads(file.read_text())
    if "rope_scaling" in changes:
        content.pop("rope_parameters", None)
    file.write_text(json.dumps(content | changes))
    with pytest.raises(UserError) as error:
        load_language_model(folder, torch.float32)
    assert all(word in str(error.value) for word in ("model.llama_model", *words))

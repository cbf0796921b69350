"""The decoding loop against transformers and against loops over whole forwards: rows join, leave and are penalised."""

from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES, write_language_model
from decoding import BOS, EOS, LENGTHS, NO_EOS, by_transformers, context, contexts, generate, greedy, stream
from golden_data import DEVICE

from minigpt4.common import device as devices
from minigpt4.conversation import generation
from minigpt4.conversation.generation import DecodingState, GenerationOptions
from minigpt4.models import recorded_step
from minigpt4.models.growing_cache import new_cache
from minigpt4.models.language_model import load_language_model, next_token_logits
from minigpt4.models.quantization import quantize_layers


@pytest.fixture(params=ARCHITECTURES)
def any_llm(request, load):
    return load(request.param)


@pytest.mark.parametrize("lengths", [(6,), LENGTHS])
def test_tokens_are_those_of_transformers(any_llm, lengths):
    embeds, mask = contexts(any_llm, lengths)
    found = [row.ids for row in generate(any_llm, embeds, mask, greedy(20), BOS, EOS)]
    assert found == by_transformers(any_llm, embeds, mask, 20)


def test_rows_end_at_different_times(llm):
    embeds, mask = contexts(llm)
    full = by_transformers(llm, embeds, mask, 12)
    each = [greedy(count) for count in (3, 12, 6)]
    found = [row.ids for row in generate(llm, embeds, mask, each, BOS, EOS)]
    assert found == [row[: o.max_new_tokens] for row, o in zip(full, each, strict=True)]


def test_each_way_to_end_is_reported(llm):
    embeds, mask = contexts(llm, (6, 6, 6), seed=3)
    embeds[:] = embeds[:1]
    (full,) = generate(llm, embeds[:1], mask[:1], greedy(6), [], NO_EOS)
    each = [greedy(6, stop=lambda ids: len(ids) == 2), greedy(4), greedy(6)]
    end = full.ids[4]
    assert len(set(full.ids)) == 6
    events = {0: [], 1: [], 2: []}
    for row, token, is_end, *_ in stream(llm, embeds, mask, each, [], [end]):
        events[row].append((token, is_end))
    expected = [full.ids[:2], full.ids[:4], full.ids[: full.ids.index(end) + 1]]
    assert [[token for token, _ in events[row]] for row in range(3)] == expected
    assert [events[row][-1][1] for row in range(3)] == [True, False, True]
    assert not any(is_end for row in events.values() for _, is_end in row[:-1])


def collect(collected, tokens):
    """Appends tokens to the ids by row number; returns the numbers of their rows."""
    for token in tokens:
        collected.setdefault(token.row, []).append(token.id)
    return [token.row for token in tokens]


def run(state, collected, num_steps=None):
    """Steps until all rows have ended, or so many; ids by row number."""
    while state.rows and num_steps != 0:
        collect(collected, state.step())
        num_steps = None if num_steps is None else num_steps - 1
    return collected


SAMPLED = GenerationOptions(max_new_tokens=12, temperature=1.5, seed=5)


@pytest.mark.parametrize("options", [greedy(12), SAMPLED, greedy(12, repetition_penalty=1.5)])
@pytest.mark.parametrize("joins_at", [0, 1, 4])
@pytest.mark.parametrize("length", [3, 15])
def test_a_row_that_joins_gets_the_tokens_it_gets_alone(llm, joins_at, length, options):
    embeds, mask = contexts(llm)
    late, late_mask = context(llm, length, seed=9)
    others = [row.ids for row in generate(llm, embeds, mask, greedy(12), BOS, NO_EOS)]
    alone = generate(llm, late, late_mask, options, BOS, NO_EOS)[0].ids
    state, ids = DecodingState(llm, BOS, NO_EOS), {}
    assert collect(ids, state.add(embeds, mask, [greedy(12)] * 3)) == [0, 1, 2]
    run(state, ids, joins_at)
    assert collect(ids, state.add(late, late_mask, [options])) == [3]
    assert run(state, ids) == dict(enumerate([*others, alone]))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["plain", "recorded"])
def test_rows_join_and_leave_in_every_architecture(any_llm, is_recorded, monkeypatch):
    """Three contexts join at steps 0, 2 and 5 and leave after 4, 9 and 6 tokens; a fourth fills the empty state.

    As a CPU cannot record, the function itself is in the place of its recording, with the tensors of fixed shape.
    """
    monkeypatch.setattr(recorded_step, "NUM_PLAIN_STEPS", 1)
    parts = [context(any_llm, length, seed) for seed, length in enumerate((9, 4, 6, 5))]
    each = [greedy(count) for count in (4, 9, 6, 3)]
    pairs = zip(parts, each, strict=True)
    alone = [generate(any_llm, *part, options, BOS, NO_EOS)[0].ids for part, options in pairs]
    replayed = []

    def record(function):
        return lambda: replayed.append(function())

    state, ids = DecodingState(any_llm, BOS, NO_EOS, record if is_recorded else None), {}
    for part, options, num_steps in zip(parts, each, (2, 3, 99, 99), strict=True):
        collect(ids, state.add(*part, [options]))
        run(state, ids, num_steps)
    assert ids == dict(enumerate(alone))
    if any_llm.config.model_type in ("llama", "mistral", "gemma2"):  # the last two have sliding windows
        assert bool(replayed) == (is_recorded and any_llm.config.model_type == "llama")


def test_steps_are_launched_anew_where_they_cannot_be_recorded(llm, caplog):
    def record(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = generate(llm, *context(llm, 8, seed=4), greedy(20), BOS, NO_EOS)[0].ids
    state, ids = DecodingState(llm, BOS, NO_EOS, record), {}
    collect(ids, state.add(*context(llm, 8, seed=4), [greedy(20)]))
    assert run(state, ids) == {0: expected} and "cannot be recorded" in caplog.text


def test_a_recorded_answer_grows_beyond_the_buffers(llm):
    """On a device that records: the same tokens as without, over several recordings, and for rows that join later."""
    record = devices.recorder(DEVICE) or (lambda function: function)
    parts, each = [context(llm, length, seed=length) for length in (8, 5)], [greedy(150), greedy(90)]
    alone = [generate(llm, *part, own, BOS, NO_EOS)[0].ids for part, own in zip(parts, each, strict=True)]
    state, ids = DecodingState(llm, BOS, NO_EOS, record), {}
    for part, own, num_steps in zip(parts, each, (30, None), strict=True):
        collect(ids, state.add(*part, [own]))
        run(state, ids, num_steps)
    assert ids == dict(enumerate(alone))


def test_a_row_joins_with_a_cache_of_its_own(llm):
    embeds, mask = context(llm, 8, seed=4)
    alone = generate(llm, embeds, mask, greedy(6), BOS, NO_EOS)[0].ids
    state, ids, cache = DecodingState(llm, BOS, NO_EOS), {}, new_cache()
    collect(ids, state.add(*contexts(llm), [greedy(8)] * 3))
    run(state, ids, 3)
    with torch.no_grad():
        next_token_logits(llm, embeds[:, :5], mask[:, :5], cache)
    (row,) = collect(ids, state.add(embeds[:, 5:], mask, [greedy(6)], cache))
    assert run(state, ids)[row] == alone


def test_rows_that_ended_are_not_computed_nor_are_columns_that_only_they_used(llm, monkeypatch):
    shapes, plain = [], generation.next_token_logits

    def spy(llm, embeds, mask, cache):
        shapes.append(tuple(mask.shape))
        return plain(llm, embeds, mask, cache)

    monkeypatch.setattr(generation, "next_token_logits", spy)
    monkeypatch.setattr(recorded_step, "next_token_logits", spy)
    embeds, mask = contexts(llm, (3, 20, 6))
    each = [greedy(9), greedy(2), greedy(5)]
    generate(llm, embeds, mask, each, BOS, NO_EOS)
    # Row 1, of 20 positions, leaves after its second token, and row 2, of 6, after its fifth.
    expected = [(3, 20), (3, 21), (2, 8), (2, 9), (2, 10), (1, 8), (1, 9), (1, 10), (1, 11)]
    assert shapes == expected


def test_a_cache_has_everything_but_the_last_token_wherever_the_reader_stops(llm):
    embeds, mask = context(llm, 6, seed=1)
    cache = new_cache()
    answer = stream(llm, embeds, mask, greedy(20), BOS, NO_EOS, cache)
    ids = [next(answer)[1] for _ in range(4)]
    answer.close()
    everything = torch.cat([embeds, llm.get_input_embeddings()(torch.tensor([ids[:3]], device=llm.device))], 1)
    with torch.no_grad():
        next_token_logits(llm, everything, torch.ones(1, 9, dtype=torch.long), expected := new_cache())
    assert cache.get_seq_length() == 9
    for own, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.values, other.values, atol=1e-5, rtol=1e-4)


def test_two_answers_at_once_do_not_disturb_each_other(llm):
    parts = [context(llm, 6, seed) for seed in (1, 2)]
    alone = [generate(llm, *part, greedy(15), BOS, NO_EOS)[0].ids for part in parts]
    streams = [stream(llm, *part, greedy(15), BOS, NO_EOS) for part in parts]
    found = [[], []]
    for steps in zip(*streams, strict=True):
        for i, token in enumerate(steps):
            found[i].append(token.id)
    assert found == alone


def test_eight_bit_rows_together_and_alone(tmp_path):
    llm = load_language_model(
        write_language_model(tmp_path, "llama2"), torch.float32, prepare=partial(quantize_layers, kind="int8")
    )
    embeds, mask = contexts(llm)
    together = [row.ids for row in generate(llm, embeds, mask, greedy(8), BOS, EOS)]
    rows = [(embeds[i : i + 1, 9 - n :], mask[i : i + 1, 9 - n :]) for i, n in enumerate(LENGTHS)]
    assert together == [generate(llm, *row, greedy(8), BOS, EOS)[0].ids for row in rows]

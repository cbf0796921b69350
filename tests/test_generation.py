"""The decoding loop against transformers and against loops over whole forwards: rows join, leave and are penalised."""

import pytest
import torch
from architectures import ARCHITECTURES, write_language_model

from minigpt4.conversation import generation
from minigpt4.conversation.generation import DecodingState, GenerationOptions, generate, stream
from minigpt4.conversation.sampling import build_warpers
from minigpt4.models.growing_cache import new_cache
from minigpt4.models.int8 import to_int8
from minigpt4.models.language_model import load_language_model, next_token_logits

BOS, EOS, NO_EOS = [1], [2], [599]
LENGTHS = (5, 9, 7)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A random model of an architecture, each built once."""
    models = {}

    def get(name="llama with biases"):
        if name not in models:
            folder = write_language_model(tmp_path_factory.mktemp("llm"), name)
            models[name] = load_language_model(folder, torch.float32)
        return models[name]

    return get


@pytest.fixture
def llm(load):
    return load()


@pytest.fixture(params=ARCHITECTURES)
def any_llm(request, load):
    return load(request.param)


def contexts(llm, lengths=LENGTHS, seed=1):
    """Embeddings [B, T, L], shorter rows padded on the left, and their mask."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    embeds = 0.5 * torch.randn(len(lengths), width, llm.config.hidden_size, generator=generator)
    return embeds, torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])


def context(llm, length, seed):
    return contexts(llm, (length,), seed)


def greedy(count, **changes):
    return GenerationOptions(do_sample=False, max_new_tokens=count, **changes)


def by_transformers(llm, embeds, mask, count, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": EOS} | settings
    output = llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=count, **settings)
    rows = [row.tolist() for row in output]
    return [row[: row.index(EOS[0]) + 1] if EOS[0] in row else row for row in rows]


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
    for row, token, is_end, _ in stream(llm, embeds, mask, each, [], [end]):
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


def test_rows_join_and_leave_in_every_architecture(any_llm):
    """Three contexts join at steps 0, 2 and 5 and leave after 4, 9 and 6 tokens; a fourth fills the empty state."""
    parts = [context(any_llm, length, seed) for seed, length in enumerate((9, 4, 6, 5))]
    each = [greedy(count) for count in (4, 9, 6, 3)]
    pairs = zip(parts, each, strict=True)
    alone = [generate(any_llm, *part, options, BOS, NO_EOS)[0].ids for part, options in pairs]
    state, ids = DecodingState(any_llm, BOS, NO_EOS), {}
    for part, options, num_steps in zip(parts, each, (2, 3, 99, 99), strict=True):
        collect(ids, state.add(*part, [options]))
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
    everything = torch.cat([embeds, llm.get_input_embeddings()(torch.tensor([ids[:3]]))], 1)
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
    llm = load_language_model(write_language_model(tmp_path, "llama2"), torch.float32, prepare=to_int8)
    embeds, mask = contexts(llm)
    together = [row.ids for row in generate(llm, embeds, mask, greedy(8), BOS, EOS)]
    rows = [(embeds[i : i + 1, 9 - n :], mask[i : i + 1, 9 - n :]) for i, n in enumerate(LENGTHS)]
    assert together == [generate(llm, *row, greedy(8), BOS, EOS)[0].ids for row in rows]


# ---- penalties and sampling -----------------------------------------------------------------------------------------


def by_hand(llm, embeds, count, bos, eos, penalty=1.0, min_length=0):
    """Greedy decoding by whole forwards, with the rules written out for one row."""
    ids = []
    while len(ids) < count:
        with torch.no_grad():
            scores = llm(inputs_embeds=embeds).logits[0, -1].tolist()
        for token in {*bos, *ids}:
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        if len(bos) + len(ids) < min_length:
            scores[eos] = -float("inf")
        ids.append(max(range(len(scores)), key=scores.__getitem__))
        if ids[-1] == eos:
            break
        embeds = torch.cat([embeds, llm.get_input_embeddings()(torch.tensor([ids[-1:]]))], 1)
    return ids


@pytest.mark.parametrize("bos", [[1], []], ids=["begin token", "no begin token"])
@pytest.mark.parametrize("penalty", [0.7, 1.3, 3.0])
def test_repetition_penalty_over_a_long_history(llm, penalty, bos):
    for seed in range(3):
        embeds, mask = context(llm, 6, seed)
        plain = generate(llm, embeds, mask, greedy(24), bos, NO_EOS)[0].ids
        found = generate(llm, embeds, mask, greedy(24, repetition_penalty=penalty), bos, NO_EOS)[0].ids
        assert found == by_hand(llm, embeds, 24, bos, NO_EOS[0], penalty)
        assert found != plain or penalty < 1


def test_the_penalty_sees_the_begin_token(llm):
    """The best first token is made the begin token: with a penalty, another one is chosen."""
    embeds, mask = context(llm, 6, seed=2)
    (best,) = generate(llm, embeds, mask, greedy(1), [], NO_EOS)[0].ids
    options = greedy(1, repetition_penalty=100.0)
    assert generate(llm, embeds, mask, options, [], NO_EOS)[0].ids == [best]
    assert generate(llm, embeds, mask, options, [best], NO_EOS)[0].ids != [best]


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_penalties_are_those_of_transformers_where_no_token_precedes(llm):
    embeds, mask = context(llm, 6, seed=1)
    settings = {"repetition_penalty": 1.4, "min_new_tokens": 9}
    found = generate(llm, embeds, mask, greedy(20, repetition_penalty=1.4, min_length=9), [], EOS)[0].ids
    assert [found] == by_transformers(llm, embeds, mask, 20, **settings)


@pytest.mark.parametrize("bos", [[1], []], ids=["begin token", "no begin token"])
@pytest.mark.parametrize("min_length", [1, 4, 8])
def test_min_length_counts_the_begin_token(llm, min_length, bos):
    for seed, number in ((0, 0), (1, 2), (2, 2)):
        embeds, mask = context(llm, 6, seed)
        eos = by_hand(llm, embeds, 6, bos, -1)[number]  # would end the row there, unless it is banned
        found = generate(llm, embeds, mask, greedy(12, min_length=min_length), bos, [eos])[0].ids
        assert found == by_hand(llm, embeds, 12, bos, eos, min_length=min_length)
        assert eos not in found[: min_length - len(bos)]


def test_any_of_several_end_tokens_ends_a_row(llm):
    embeds, mask = context(llm, 6, seed=1)
    full = generate(llm, embeds, mask, greedy(8), BOS, NO_EOS)[0].ids
    ends = [full[5], full[3]]
    first = min(full.index(token) for token in ends)
    assert generate(llm, embeds, mask, greedy(8), BOS, ends)[0].ids == full[: first + 1]


@pytest.mark.parametrize(("presence", "frequency"), [(0.3, 0.0), (0.0, 0.2), (-0.1, 0.4)])
def test_presence_and_frequency_penalties_are_openais_formula(llm, presence, frequency):
    embeds, mask = context(llm, 6, seed=1)
    plain = generate(llm, embeds, mask, greedy(24), BOS, NO_EOS)[0].ids
    options = greedy(24, presence_penalty=presence, frequency_penalty=frequency)
    found, inputs, ids = generate(llm, embeds, mask, options, BOS, NO_EOS)[0].ids, embeds, []
    for _ in range(24):
        with torch.no_grad():
            scores = llm(inputs_embeds=inputs).logits[0, -1].tolist()
        for token in set(ids):
            scores[token] -= presence + frequency * ids.count(token)
        ids.append(max(range(len(scores)), key=scores.__getitem__))
        inputs = torch.cat([inputs, llm.get_input_embeddings()(torch.tensor([ids[-1:]]))], 1)
    assert found == ids != plain


def test_own_logits_processors_are_called_with_the_history(llm):
    embeds, mask = context(llm, 6, seed=1)
    plain, histories = generate(llm, embeds, mask, greedy(3), BOS, NO_EOS)[0].ids, []

    def ban_first_choice(ids, scores):
        histories.append(ids.tolist())
        return scores.index_fill(1, torch.tensor([plain[0]]), -float("inf"))

    found = generate(llm, embeds, mask, greedy(3, logits_processors=[ban_first_choice]), BOS, NO_EOS)[0].ids
    assert plain[0] not in found and histories == [[BOS + found[:n]] for n in range(3)]


def test_log_probabilities_are_those_of_the_models_logits(llm):
    embeds, mask = context(llm, 6, seed=1)
    with torch.no_grad():
        expected = next_token_logits(llm, embeds, mask, new_cache())[0].log_softmax(-1)
    options = [greedy(1, top_logprobs=3, presence_penalty=1.0), greedy(1, top_logprobs=0), greedy(1)]
    rows = embeds.expand(3, -1, -1), mask.expand(3, -1)
    tokens = {token.row: token for token in stream(llm, *rows, options, BOS, NO_EOS)}
    best = expected.topk(3)
    logprob, top = tokens[0].logprobs
    assert logprob == pytest.approx(expected[tokens[0].id].item(), abs=1e-5)
    assert [token_id for token_id, _ in top] == best.indices.tolist()
    assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert tokens[1].logprobs == (pytest.approx(logprob), []) and tokens[2].logprobs is None


def test_sampled_tokens_have_the_probabilities_of_the_warped_logits(llm):
    embeds, mask = context(llm, 6, seed=1)
    count, options = 2000, GenerationOptions(max_new_tokens=1, temperature=0.8, top_p=0.8)
    with torch.no_grad():
        logits = next_token_logits(llm, embeds, mask, new_cache())
    expected = build_warpers(options)(None, logits).softmax(-1)[0]
    rows = embeds.expand(count, -1, -1), mask.expand(count, -1)
    torch.manual_seed(0)
    drawn = [row.ids[0] for row in generate(llm, *rows, options, BOS, NO_EOS)]
    found = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / count
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 0.04  # four standard deviations of a share of one half


def test_seeds_make_rows_repeatable_whatever_is_drawn_beside_them(llm):
    embeds, mask = context(llm, 6, seed=1)

    def draw(seed):
        torch.manual_seed(draw.calls)
        draw.calls += 1
        options = GenerationOptions(max_new_tokens=8, temperature=2.0, seed=seed)
        return tuple(generate(llm, embeds, mask, options, BOS, NO_EOS)[0].ids)

    draw.calls = 0
    assert draw(3) == draw(3) and len({draw(seed) for seed in range(4)}) > 1
    assert draw(-1) == draw(-1) and draw(2**70) == draw(2**70)


def test_temperature_zero_takes_the_most_probable_token(llm):
    embeds, mask = context(llm, 6, seed=1)
    options = [greedy(8), GenerationOptions(max_new_tokens=8, temperature=0), greedy(8, temperature=0)]
    ids = [generate(llm, embeds, mask, o, BOS, NO_EOS)[0].ids for o in options]
    assert ids[0] == ids[1] == ids[2]

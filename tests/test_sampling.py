"""How tokens are chosen: penalties, log probabilities, sampling and seeds."""

import pytest
import torch
from decoding import BOS, EOS, NO_EOS, by_transformers, context, generate, greedy, stream
from transformers import TopKLogitsWarper, TopPLogitsWarper

from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.sampling import build_warpers
from minigpt4.models.growing_cache import new_cache
from minigpt4.models.language_model import next_token_logits


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


def test_top_p_of_what_top_k_leaves_is_transformers_top_p(llm):
    """Rows of many equal logits, too, of which top-k keeps all that equal its last one."""
    logits = torch.randn(40, 600, generator=torch.Generator().manual_seed(1)).mul(3)
    logits[20:] = logits[20:].round()
    for top_p in (0.0, 0.3, 0.9):
        options = GenerationOptions(temperature=0.7, top_p=top_p)
        expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(50)(None, logits / 0.7))
        found = build_warpers(options)(None, logits)
        assert torch.equal(found[:20], expected[:20])
        assert torch.equal(found[20:].sort().values, expected[20:].sort().values)  # of equal ones, any may be kept


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

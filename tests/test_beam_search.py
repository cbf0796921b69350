"""Beam search against exhaustive search, and beam sampling against a second implementation, on a Markov chain."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy
import pytest
import torch
from decoding import generate
from torch import nn

from minigpt4.conversation.generation import GenerationOptions, tokens_of
from minigpt4.conversation.sampling import build_warpers

BOS = 0


class MarkovChain(nn.Module):
    """A language model whose logits depend on the last token alone; the embedding of a token is its one-hot vector."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = logits  # [V, V]

    def get_input_embeddings(self):
        return lambda ids: torch.eye(len(self.logits))[ids]

    def forward(self, inputs_embeds, cache=None, past_key_values=None, **_):
        keys = torch.zeros(len(inputs_embeds), 1, inputs_embeds.shape[1], 1)
        (past_key_values if cache is None else cache).update(keys, keys, 0)
        return SimpleNamespace(logits=inputs_embeds[:, -1:] @ self.logits)


def chain(num_tokens, seed, scale=1.0):
    return MarkovChain(scale * torch.randn(num_tokens, num_tokens, generator=torch.Generator().manual_seed(seed)))


def search(llm, options, eos, bos=(BOS,)):
    embeds = llm.get_input_embeddings()(torch.tensor([[BOS]]))
    return generate(llm, embeds, torch.ones(1, 1, dtype=torch.long), options, list(bos), list(eos))[0]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("seed", range(6))
def test_with_enough_beams_the_best_sequence_is_found(seed, length_penalty):
    llm, eos, length = chain(4, seed), 3, 3
    log_probs = llm.logits.log_softmax(-1).tolist()

    def score(ids):
        total = sum(log_probs[a][b] for a, b in itertools.pairwise([BOS, *ids]))
        return total / (1 + len(ids) - (ids[-1] == eos)) ** length_penalty

    ended = [[*ids, eos] for n in range(length) for ids in itertools.product(range(3), repeat=n)]
    full = [list(ids) for ids in itertools.product(range(3), repeat=length)]
    ranking = sorted(ended + full, key=score, reverse=True)
    options = GenerationOptions(length, num_beams=40, do_sample=False, length_penalty=length_penalty)
    found = search(llm, options, [eos])
    assert found.ids == ranking[0]
    assert found.beam_scores == pytest.approx([score(ids) for ids in found.beams], abs=1e-5)


@pytest.mark.parametrize("bos", [[BOS], []], ids=["begin token", "no begin token"])
def test_penalties_apply_to_beams(bos):
    llm = chain(5, 1)
    options = GenerationOptions(6, num_beams=3, do_sample=False, min_length=5, repetition_penalty=2.0)
    found, other = search(llm, options, [4], bos), search(llm, options, [4], [2])
    assert all(4 not in ids[: 5 - len(bos)] for ids in found.beams)
    assert found.beams != other.beams  # the penalty saw another begin token


def test_several_end_tokens_leave_enough_beams():
    llm = chain(8, 2)
    found = search(llm, GenerationOptions(6, num_beams=3, do_sample=False), [5, 6, 7])
    assert len(found.beams) == 3
    assert all(not {5, 6, 7} & set(ids[:-1]) for ids in found.beams)


def test_beams_go_on_beside_several_end_tokens():
    """The three best tokens end; of the two that go on, the worse one leads to the best sequence."""
    llm = chain(6, 0)
    llm.logits[BOS] = torch.tensor([-9.0, 1.0, 0.9, 3.0, 2.9, 2.8])
    llm.logits[1], llm.logits[2] = torch.zeros(6), torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = search(llm, GenerationOptions(2, num_beams=2, do_sample=False, length_penalty=5.0), [3, 4, 5])
    assert found.ids == [2, 0]


def test_temperature_zero_is_beam_search():
    llm = chain(8, 2)
    beams = [
        search(llm, GenerationOptions(5, num_beams=3, do_sample=do_sample, temperature=0.0), [7]).beams
        for do_sample in (True, False)
    ]
    assert beams[0] == beams[1]


def test_stop_ends_a_beam_and_keeps_its_last_token():
    llm = chain(8, 3)
    options = GenerationOptions(6, num_beams=4, do_sample=False, stop=lambda ids: ids[-1] in (1, 2, 3, 4, 5))
    found = search(llm, options, [7])
    assert len(found.beams) == 4 and found.beam_scores == sorted(found.beam_scores, reverse=True)
    assert all(ids[-1] in (1, 2, 3, 4, 5, 7) or len(ids) == 6 for ids in found.beams)


def test_the_tokens_of_beams_end_with_an_end_token_a_stop_or_max_new_tokens():
    llm = chain(8, 3)
    best = int(llm.logits[BOS].argmax())
    for eos, length, is_stopped in (([], 0, False), ([best], 0, True), ([], 3, True)):
        options = GenerationOptions(6, num_beams=4, do_sample=False, length_penalty=0.0)
        options.stop = lambda ids, length=length: len(ids) == length
        found = search(llm, options, eos)
        events = tokens_of(found, 0, options, eos)
        ids = [token.id for token in events]
        assert ids == found.ids and len(ids) == (6 if not is_stopped else length or 1)
        assert [token.is_end for token in events] == [False] * (len(ids) - 1) + [is_stopped]


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("num_beams", [2, 5, 8])
def test_sampled_beams_always_answer(num_beams, scale):
    """Peaked logits leave fewer candidates with a probability above zero in float32 than are drawn."""
    for seed in range(40):
        llm = chain(12, seed, scale)
        temperature, top_p = (0.1, 0.7, 1.0, 2.0)[seed % 4], (0.05, 0.9, 1.0)[seed % 3]
        options = GenerationOptions(8, num_beams, temperature=temperature, top_p=top_p, seed=seed, min_length=seed % 5)
        ends = {11} if seed % 2 else {7, 8, 9, 10, 11}
        found = search(llm, options, ends)
        assert found.ids == found.beams[0] and 1 <= len(found.beams) <= num_beams
        assert all(1 <= len(ids) <= 8 and not ends & set(ids[:-1]) for ids in found.beams)
        assert all(map(math.isfinite, found.beam_scores)) and found.beam_scores == sorted(found.beam_scores)[::-1]
        assert search(llm, options, ends).beams == found.beams


def test_an_end_token_below_the_best_beams_ends_nothing():
    llm = chain(5, 0)
    llm.logits[BOS] = torch.tensor([-5.0, 3.0, 2.9, -5.0, 2.8])  # 4 ends; a negative length penalty prefers short beams
    found = search(llm, GenerationOptions(1, num_beams=2, do_sample=False, length_penalty=-1.0), [4])
    assert found.beams == [[1], [2]]


def sampled_by_hand(logits, rng, num_beams, length, temperature, top_p, eos):
    """Beam sampling of transformers 4.28 in numpy, with draws without replacement one after the other."""
    size = len(logits)
    log_probs = logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))
    beams, sums, finished = [[] for _ in range(num_beams)], [0.0] * num_beams, []
    for step in range(length):
        rows = []
        for ids, total in zip(beams, sums, strict=True):
            scores = (log_probs[ids[-1] if ids else BOS] + total) / temperature
            order = numpy.argsort(-scores)
            shares = numpy.exp(scores[order] - scores.max())
            shares = numpy.cumsum(shares[::-1])[::-1] / shares.sum()  # of a token and all that are less probable
            keep = shares > 1 - top_p
            keep[:2] = True
            scores[order[~keep]] = -numpy.inf
            rows.append(scores)
        totals = numpy.concatenate(rows)
        probabilities = numpy.exp(totals - totals.max())
        drawn = []
        for _ in range(2 * num_beams):
            drawn.append(rng.choice(len(totals), p=probabilities / probabilities.sum()))
            probabilities[drawn[-1]] = 0
        drawn.sort(key=lambda index: -totals[index])
        kept = []
        for rank, index in enumerate(drawn):
            ids = [*beams[index // size], index % size]
            if ids[-1] == eos and rank < num_beams:
                finished.append((totals[index] / (1 + step), ids))
            elif ids[-1] != eos and len(kept) < num_beams:
                kept.append((totals[index], ids))
        finished = sorted(finished, reverse=True)[:num_beams]
        sums, beams = [total for total, _ in kept], [ids for _, ids in kept]
        if len(finished) == num_beams and finished[-1][0] >= totals[drawn[0]] / (1 + step):
            break
    else:
        finished += [(total / (1 + length), ids) for total, ids in zip(sums, beams, strict=True)]
    return tuple(max(finished)[1])


def test_sampled_beams_have_the_distribution_of_transformers():
    count, num_beams, length, eos = 600, 2, 3, 4
    llm = chain(5, 7, 0.7)
    options = GenerationOptions(length, num_beams, temperature=1.3, top_p=0.9)
    torch.manual_seed(0)
    found = Counter(tuple(search(llm, options, [eos]).ids) for _ in range(count))
    rng, logits = numpy.random.default_rng(0), llm.logits.double().numpy()
    expected = Counter(sampled_by_hand(logits, rng, num_beams, length, 1.3, 0.9, eos) for _ in range(count))
    distance = sum(abs(found[ids] - expected[ids]) for ids in found | expected) / (2 * count)
    assert len(expected) > 10 and distance < 0.1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_acts_on_the_running_sums_of_sampled_beams(temperature):
    llm, eos = chain(6, 4), 5
    log_probs = llm.logits.log_softmax(-1).tolist()
    for seed in range(5):
        options = GenerationOptions(4, 3, temperature=temperature, top_p=1.0, seed=seed)
        found = search(llm, options, [eos])
        for ids, score in zip(found.beams, found.beam_scores, strict=True):
            total = 0.0
            for pair in itertools.pairwise([BOS, *ids]):
                total = (total + log_probs[pair[0]][pair[1]]) / temperature
            assert score == pytest.approx(total / (1 + len(ids) - (ids[-1] == eos)), abs=1e-4)


def test_sampled_beams_all_start_alike():
    """Of two possible tokens and three beams, all six candidates are drawn; the best three are the same token."""
    llm = chain(4, 1)
    llm.logits[BOS, 2:] = -1e4
    best = int(llm.logits[BOS].argmax())
    for seed in range(5):
        assert search(llm, GenerationOptions(1, 3, seed=seed), [3]).beams == [[best]] * 3


@pytest.mark.parametrize(("num_beams", "num_kept"), [(1, 1), (2, 2), (5, 2)])
def test_sampled_beams_keep_two_tokens_at_least(num_beams, num_kept):
    logits = torch.tensor([[5.0, 1.0, 0.0, -1.0]])
    assert (build_warpers(GenerationOptions(num_beams=num_beams, top_p=0.01))(None, logits) > -1e9).sum() == num_kept

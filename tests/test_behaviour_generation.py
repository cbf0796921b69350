"""Penalties of greedy answers, compared with the logits processors of transformers over histories of forty tokens."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from decoding import generate
from golden_data import TINY
from transformers.generation.logits_process import MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models import MiniGPT4

LENGTH = 40
NONE = 599  # an id that no answer here holds


@pytest.fixture(scope="module")
def llm():
    """The LM as MiniGPT4 holds it."""
    from conftest import TINY_CONFIG

    return MiniGPT4.from_config(TINY_CONFIG | {"llm_dtype": "fp32"}, device=torch.device("cpu")).llama_model


@pytest.fixture(scope="module")
def plain():
    """The same LM as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY / "llama", dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[0, 1])
def prompt(request, plain):
    """The embeddings [1, T, L] of a prompt."""
    generator = torch.Generator().manual_seed(request.param)
    ids = torch.randint(3, 500, (1, 12), generator=generator)
    return plain.get_input_embeddings()(ids)


def answer(llm, embeds, bos=NONE, eos=NONE, **options):
    options = GenerationOptions(do_sample=False, **{"max_new_tokens": LENGTH, "min_length": 0} | options)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    return list(generate(llm, embeds, mask, options, [bos], [eos])[0].ids)


def expected(plain, embeds, bos=NONE, eos=NONE, repetition_penalty=1.0, min_length=0):
    """Greedy search token by token; the history begins with BOS. Returns the ids and all raw logits of seen ids."""
    history, seen, embedding = torch.tensor([[bos]]), [], plain.get_input_embeddings()
    processors = transformers.LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition_penalty)])
    if min_length:
        processors.append(MinLengthLogitsProcessor(min_length, eos))
    while history.shape[1] <= LENGTH and (history[0, -1] != eos or history.shape[1] == 1):
        context = torch.cat([embeds, embedding(history[:, 1:])], 1)
        logits = plain(inputs_embeds=context).logits[:, -1].float()
        seen += logits[0, history[0]].tolist()
        history = torch.cat([history, processors(history, logits).argmax(-1, keepdim=True)], 1)
    return history[0, 1:].tolist(), seen


@contextmanager
def lowered(models, amount):
    """Lowers all logits, which changes no probability; below 0 the repetition penalty multiplies instead of divides."""
    hooks = [m.get_output_embeddings().register_forward_hook(lambda *call: call[-1] - amount) for m in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("amount", [0, 50], ids=["logits of both signs", "negative logits"])
@pytest.mark.parametrize("penalty", [1.1, 1.3, 2.0])
def test_repetition_penalty_over_a_long_history(llm, plain, prompt, penalty, amount):
    with lowered([llm, plain], amount):
        ids, seen = expected(plain, prompt, repetition_penalty=penalty)
        assert min(seen) < -0.1 and (max(seen) > 0.1) == (amount == 0)
        assert len(ids) == LENGTH and ids != expected(plain, prompt)[0]
        assert answer(llm, prompt, repetition_penalty=penalty) == ids


def test_bos_counts_as_history_and_eos_does_not(llm, plain, prompt):
    first = expected(plain, prompt)[0][0]
    ids, _ = expected(plain, prompt, bos=first, repetition_penalty=3.0)
    assert ids[0] != first
    assert answer(llm, prompt, bos=first, repetition_penalty=3.0) == ids
    assert answer(llm, prompt, eos=first, repetition_penalty=3.0) == [first]
    beam = {"num_beams": 2, "max_new_tokens": 1, "repetition_penalty": 3.0}
    assert answer(llm, prompt, **beam) == [first] != answer(llm, prompt, bos=first, **beam)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("min_length", range(8))
def test_the_end_token_is_banned_up_to_min_length(llm, plain, prompt, min_length, penalty):
    """Of a token that the answer would hold as its third; BOS counts towards the length."""
    free, _ = expected(plain, prompt, repetition_penalty=penalty)
    eos = free[2]
    assert eos not in free[:2]
    ids, _ = expected(plain, prompt, eos=eos, min_length=min_length, repetition_penalty=penalty)
    assert (ids == free[:3]) == (min_length <= 3)
    assert answer(llm, prompt, eos=eos, min_length=min_length, repetition_penalty=penalty) == ids


def test_both_penalties_together(llm, plain, prompt):
    eos = expected(plain, prompt)[0][2]
    ids, _ = expected(plain, prompt, eos=eos, min_length=30, repetition_penalty=1.2)
    assert len(ids) >= 29
    assert answer(llm, prompt, eos=eos, min_length=30, repetition_penalty=1.2) == ids


def test_each_row_of_a_batch_has_its_own_history(llm, plain):
    """Rows of different lengths, the shorter one padded on the left, each with its own options."""
    embedding = plain.get_input_embeddings()
    short, long = embedding(torch.arange(20, 27)[None]), embedding(torch.arange(100, 115)[None])
    eos = expected(plain, short, repetition_penalty=1.3)[0][4]
    alone = [
        expected(plain, short, eos=eos, repetition_penalty=1.3)[0],
        expected(plain, long, eos=eos, repetition_penalty=2.0, min_length=20)[0],
    ]
    assert len(alone[0]) == 5 and len(alone[1]) > 19
    padded = torch.cat([torch.zeros(1, 8, short.shape[2]), short], 1)
    mask = torch.tensor([[0] * 8 + [1] * 7, [1] * 15])
    options = [
        GenerationOptions(do_sample=False, max_new_tokens=LENGTH, repetition_penalty=1.3),
        GenerationOptions(do_sample=False, max_new_tokens=LENGTH, repetition_penalty=2.0, min_length=20),
    ]
    rows = generate(llm, torch.cat([padded, long]), mask, options, [NONE], [eos])
    assert [list(row.ids) for row in rows] == alone


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_beams_with_a_repetition_penalty(llm, plain, prompt, penalty):
    """As transformers' own beam search, which knows no BOS here, so that it may neither occur nor count."""
    settings = {"num_beams": 3, "length_penalty": 0.0, "repetition_penalty": penalty, "max_new_tokens": 20}
    mask = torch.ones(prompt.shape[:2], dtype=torch.long)
    fixed = {"do_sample": False, "eos_token_id": NONE, "pad_token_id": NONE, "use_cache": True}
    theirs = plain.generate(inputs_embeds=prompt, attention_mask=mask, **settings, **fixed)[0].tolist()
    assert len(theirs) == 20
    assert answer(llm, prompt, **settings) == theirs

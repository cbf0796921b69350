"""Stop strings of the API: where they end an answer, and how much is decoded for them with each token."""

from random import Random

import pytest
from test_constrained import TOKENIZERS

from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve.api_requests import Body, Limits, read_options


def stop_of(texts, decode):
    body = Body(model="m", messages=[{"role": "user", "content": "Why?"}], stop=texts)
    return read_options(body, Limits(), GenerationOptions(), decode).stop


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_answers_end_with_the_token_that_completes_a_stop_string(kind):
    """As where all tokens are decoded each time; the strings are parts of the text and begin within its tokens."""
    tokenizer, rng, num_ended = TOKENIZERS[kind](), Random(0), 0
    known = tokenizer.encode(
        'the number of red and green 两只 🐕 names: "names", {"两": 20} ', add_special_tokens=False
    )
    for case in range(60):
        ids = [rng.choice(known) if rng.random() < 0.7 else rng.randrange(3, len(tokenizer)) for _ in range(80)]
        if case % 2:
            ids = known * 3
        text = tokenizer.decode(ids)
        texts = []
        for _ in range(rng.choice([1, 4])):
            begin = rng.randrange(len(text))
            texts.append(text[begin : begin + rng.choice([1, 2, 5, 20, 60])] + rng.choice(["", "", "!"]))
        stop = stop_of(texts, tokenizer.decode)
        for n in range(1, len(ids) + 1):
            expected = any(each in tokenizer.decode(ids[:n]) for each in texts)
            assert stop(ids[:n]) == expected, (ids[:n], texts)
            if expected:
                num_ended += 1
                break
    assert num_ended > 30


def test_each_token_costs_one_short_decoding():
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return "word " * len(ids)

    stop = stop_of(["z" * 199 + chr(97 + i) for i in range(16)], decode)
    for n in range(1, 1001):
        assert not stop([5] * n)
    assert len(decoded) == 1001 and max(decoded) < 50  # 16 times 801 tokens would be the simplest way


def test_without_stop_strings_nothing_is_decoded():
    stop = stop_of([""], lambda ids: pytest.fail("decoded"))
    assert not stop([1, 2, 3])

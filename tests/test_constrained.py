"""Answers in JSON: with slow and fast tokenizers, whole and streamed, and what a grammar cannot do."""

import json

import openai
import pytest
import torch
from golden_data import TINY
from llguidance import LLMatcher
from serving import Server, content, data_url
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.serve.api_requests import ApiError, ResponseFormat
from minigpt4.serve.constrained import GrammarProcessor, compile_format, read_vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 20},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "两": {"const": "只 🐕"},
        "nothing": {"type": "null"},
    },
    "required": ["colour", "number", "names", "两", "nothing"],
    "additionalProperties": False,
}


def form(schema):
    return ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def check(data):
    assert list(data) == SCHEMA["required"]
    assert data["colour"] in ("red", "green", "blue") and data["number"] in range(21)
    assert 1 <= len(data["names"]) <= 2 and all(len(name) <= 3 for name in data["names"])
    assert data["两"] == "只 🐕" and data["nothing"] is None


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([json.dumps(SCHEMA), __doc__], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZERS = {
    "slow": lambda: load_tokenizer(TINY / "llama"),
    "fast, of bytes": byte_level,
    "fast, of pieces": lambda: AutoTokenizer.from_pretrained(TINY / "llama", local_files_only=True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_random_tokens_follow_the_schema(kind):
    tokenizer = TOKENIZERS[kind]()
    vocabulary = read_vocabulary(tokenizer, [tokenizer.eos_token_id], "###")
    grammar, generator = compile_format(form(SCHEMA), vocabulary), torch.Generator().manual_seed(0)
    for _ in range(5):
        processor, ids = GrammarProcessor(vocabulary, grammar), [1, 5]  # of which the answer knows nothing
        while ids[-1] != tokenizer.eos_token_id and len(ids) < 300:
            scores = torch.randn(1, len(tokenizer) + 7, generator=generator)  # LMs may have more ids
            ids.append(int(processor(torch.tensor([ids]), scores).argmax()))
        processor.check()
        check(json.loads(tokenizer.decode(ids[2:-1])))


def test_a_panic_of_the_library_is_an_error_of_the_request(monkeypatch):
    tokenizer = load_tokenizer(TINY / "llama")
    vocabulary = read_vocabulary(tokenizer, [tokenizer.eos_token_id])
    for n in range(4):  # cut within a character for a message
        with pytest.raises(ApiError, match="The schema cannot be used: ") as error:
            compile_format(form({"type": ["string", {"x" * n: "𝄞" * 200}]}), vocabulary)
        assert error.value.status == 400
    processor = GrammarProcessor(vocabulary, compile_format(form({"type": "integer"}), vocabulary))
    panic = type("PanicException", (BaseException,), {})

    class Matcher:
        def consume_tokens(self, ids):
            raise panic("index out of bounds")

    processor._matcher = Matcher()
    scores = processor(torch.tensor([[1]]), torch.zeros(1, 600))
    assert scores.argmax() == tokenizer.eos_token_id and scores.isfinite().sum() == 1
    with pytest.raises(ApiError, match="index out of bounds"):
        processor.check()


@pytest.fixture(scope="module")
def server(chat):
    server = Server(chat, max_tokens=200)
    yield server
    server.close()


@pytest.fixture(scope="module")
def image(scene_folder):
    return content(data_url((scene_folder / "0.png").read_bytes()))


def test_an_object_without_a_schema(server, image):
    found = server.ask(image, response_format={"type": "json_object"}, max_tokens=100, logit_bias={"2": 5})
    text = found.choices[0].message.content
    assert text.startswith("{") and "###" not in text  # which would end it
    assert found.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def response_format(schema):
    return form(schema).model_dump(by_alias=True)


@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 2, "seed": 1}, {"frequency_penalty": 2}])
def test_answers_follow_the_schema(server, image, options):
    options = {"response_format": response_format(SCHEMA), "max_tokens": 200} | options
    found = server.ask(image, **options)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        check(json.loads(choice.message.content))
    texts = [""] * len(found.choices)
    for chunk in server.ask(image, **options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in found.choices]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "array", "uniqueItems": True},
        {"type": "string", "pattern": "("},
        {"$ref": "http://a/"},
        {"const": "a###b"},
        {"enum": ["x" * 100_000]},
        {"multipleOf": 2985040},  # would take minutes
        {"multipleOf": 29.85040},
        {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]},
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(server, schema):
    with pytest.raises(openai.BadRequestError, match="The schema cannot be used: ") as error:
        server.ask("Why?", response_format=response_format(schema))
    assert error.value.param == "response_format.json_schema.schema" and error.value.code == "invalid_schema"


def test_a_grammar_that_becomes_too_complex_ends_the_answer_with_an_error():
    tokenizer = load_tokenizer(TINY / "llama")
    vocabulary = read_vocabulary(tokenizer, [tokenizer.eos_token_id], "###")
    processor = GrammarProcessor(vocabulary, LLMatcher(vocabulary.tokens, '{"grammars": []}', log_level=0))
    scores = processor(torch.tensor([[1]]), torch.zeros(1, 600))
    assert scores.argmax() == tokenizer.eos_token_id and scores.isfinite().sum() == 1
    with pytest.raises(ApiError, match="too complex"):
        processor.check()


def test_beam_search_has_no_grammar(server, monkeypatch):
    from minigpt4.serve.api_requests import Limits, parse_body, read_options

    beams = GenerationOptions(num_beams=3)
    for fields in ({"response_format": {"type": "json_object"}}, {"logprobs": True}):
        body = parse_body(json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]} | fields).encode())
        with pytest.raises(ApiError, match="--num-beams") as error:
            read_options(body, Limits(), beams, str)
        assert error.value.body["error"]["param"] in fields


def test_a_tokenizer_that_cannot_be_read_is_reported():
    for param in ("logprobs", "response_format"):
        with pytest.raises(ApiError, match="not supported with the tokenizer of this model") as error:
            read_vocabulary(object(), [2], "###", param)
        assert error.value.status == 400 and error.value.body["error"]["param"] == param

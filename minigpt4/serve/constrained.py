"""What the tokens of an answer are limited to: a grammar of JSON, by llguidance, and biases; and the tokens' bytes."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor

from minigpt4.serve.api_requests import ApiError, ResponseFormat

# Without free whitespace, with which a model may fill an answer.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_CHARACTERS = 100_000  # of a schema
_MAX_MULTIPLES = 10_000
_MAX_STATES = 25_000  # of an answer's lexer, with 1 to 2 kB each
_PARAM = "response_format.json_schema.schema"


class _SentencePieceVocabulary:
    """The vocabulary of a slow tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Any) -> None:
        model, size = tokenizer.sp_model, tokenizer.sp_model.vocab_size()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for i, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
            if i >= size or model.is_control(i) or model.is_unknown(i):
                self.special_token_ids.append(i)
            is_byte = i < size and model.is_byte(i)  # <0x41>
            self.tokens.append(bytes([int(piece[1:-1], 16)]) if is_byte else (piece or "").replace("▁", " ").encode())
        special = set(self.special_token_ids)
        self._ids = {token: i for i, token in enumerate(self.tokens) if i not in special}
        self._max_length = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text that the grammar prescribes: the longest tokens from left to right."""
        data, ids = text.encode() if isinstance(text, str) else text, []
        while data:
            lengths = range(min(len(data), self._max_length), 0, -1)
            length = next((n for n in lengths if data[:n] in self._ids), 1)
            ids += [self._ids[data[:length]]] if data[:length] in self._ids else []
            data = data[length:]
        return ids


@dataclass
class Vocabulary:
    """A tokenizer's tokens; ``completing[k]`` are those that end an answer after the first k bytes of ``stop``."""

    tokens: LLTokenizer
    stop: bytes
    completing: list[list[int]]


def read_vocabulary(
    tokenizer: Any, eos_ids: Sequence[int], stop_string: str = "", param: str = "logprobs"
) -> Vocabulary:
    """Reads the bytes of all tokens, which takes about a second; ``stop_string`` is the one of the chat template.

    ApiError 400, which names the field ``param``, for a tokenizer that llguidance cannot read.
    """
    try:
        if hasattr(tokenizer, "sp_model"):
            tokens = LLTokenizer(TokenizerWrapper(_SentencePieceVocabulary(tokenizer)), eos_token=list(eos_ids))
        else:
            tokens = from_tokenizer(tokenizer, eos_token=list(eos_ids))
    except ValueError as error:
        text = f"logprobs and JSON are not supported with the tokenizer of this model ({error})."
        raise ApiError(text, param, code="unsupported_parameter") from error
    texts = {i: tokens.decode_bytes([i]) for i in range(tokens.vocab_size) if not tokens.is_special_token(i)}
    stop, completing = stop_string.encode(), []
    for k in range(len(stop)):
        completing.append([i for i, text in texts.items() if (text.startswith(stop[k:]) if k else stop in text)])
    return Vocabulary(tokens, stop, completing)


def compile_format(form: ResponseFormat, vocabulary: Vocabulary) -> LLMatcher:
    """The grammar of a JSON format; ApiError 400 for a schema that is wrong or has keywords that are not supported."""
    schema = form.json_schema.schema_ if form.json_schema else {"type": "object"}
    text = json.dumps(schema, ensure_ascii=False)
    try:
        _check_multiples(schema)
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"it has {len(text)} characters, at most {_MAX_CHARACTERS} are accepted")
        if vocabulary.stop and vocabulary.stop.decode() in text:
            raise ValueError(f"it contains {vocabulary.stop.decode()}, which ends answers")
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_LAYOUT)
        limits = LLParserLimits(max_lexer_states=_MAX_STATES)
        matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=limits)
        error = matcher.get_error()
    except BaseException as failure:
        error = _cause(failure)
    if error:
        raise ApiError(f"The schema cannot be used: {error[:300]}", _PARAM, code="invalid_schema")
    return matcher


def _check_multiples(schema: dict[str, Any]) -> None:
    """ValueError if the numbers of ``multipleOf`` add up to more than llguidance compiles within milliseconds."""
    total, rest = 0, [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            number = value.get("multipleOf")
            if isinstance(number, int | float) and math.isfinite(number):
                total += abs(int("".join(filter(str.isdigit, f"{number:.12f}".rstrip("0"))) or 0))
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    if total > _MAX_MULTIPLES:
        raise ValueError(f"multipleOf is accepted up to {_MAX_MULTIPLES}, without the decimal point and added up")


class GrammarProcessor(LogitsProcessor):
    """Excludes the tokens with which one answer would leave a grammar, or end in the middle by the stop string."""

    def __init__(self, vocabulary: Vocabulary, grammar: LLMatcher) -> None:
        self._vocabulary, self._matcher = vocabulary, grammar.deep_copy()
        self._num_begin, self._num_read, self._problem = -1, -1, ""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """History [1, n] of begin and new tokens, and scores [1, V], to scores [1, V]."""
        ids = input_ids[0].tolist()
        if self._num_read < 0:
            self._num_begin = self._num_read = len(ids)
        is_allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        try:
            self._matcher.consume_tokens(ids[self._num_read :])
            bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            found = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[: len(is_allowed)]
            is_allowed[: len(found)] = found
        except BaseException as error:  # it would end the engine's thread
            self._problem = _cause(error)
            is_allowed[self._vocabulary.tokens.eos_tokens] = True
        self._num_read = len(ids)
        goes_on = is_allowed.clone()
        goes_on[self._ends(ids[self._num_begin :])] = False
        is_allowed = goes_on if goes_on.any() else is_allowed
        return scores.masked_fill(~is_allowed.to(scores.device), -torch.inf)

    def _ends(self, ids: list[int]) -> list[int]:
        """The tokens that complete the stop string after ``ids``."""
        stop, completing = self._vocabulary.stop, self._vocabulary.completing
        text = self._vocabulary.tokens.decode_bytes(ids[-len(stop) :])
        return [i for k in range(len(stop)) if text.endswith(stop[:k]) for i in completing[k]]

    def check(self) -> None:
        """Raises ApiError 400 if the grammar was too complex; the answer has then ended early."""
        if error := self._problem or self._matcher.get_error():
            raise ApiError(f"The schema is too complex: {error}", _PARAM, code="invalid_schema")


def _cause(error: BaseException) -> str:
    """What a ValueError says, or a panic of Rust, which is no Exception; other errors are raised again."""
    if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
        raise error
    return f"llguidance says: {error}"


def add_bias(bias: Mapping[int, float], num_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor that adds values to the scores of tokens; ApiError 400 for an id that is none."""
    if wrong := [i for i in bias if not 0 <= i < num_tokens]:
        raise ApiError(f"{wrong[0]} is no token; the ids are 0 to {num_tokens - 1}.", f"logit_bias.{wrong[0]}")
    ids, values = torch.tensor(list(bias), dtype=torch.long), torch.tensor(list(bias.values()))

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, ids.to(scores.device), values.to(scores)[None])

    return process

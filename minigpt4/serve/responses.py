"""Answers in OpenAI's format: whole, and as the server-sent events of a stream."""

import bisect
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.boxes import box_fields
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve.api_requests import ApiError, Body
from minigpt4.serve.constrained import Vocabulary


@dataclass
class ResponseWriter:
    """Writes the answers of one request; ``vocabulary`` is needed for log probabilities, ``has_boxes`` adds boxes."""

    body: Body
    stop_strings: Sequence[str]
    vocabulary: Vocabulary | None = None
    has_boxes: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response without streaming."""
        choices = []
        for i, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None} | self._boxes(answer)
            logprobs = self._logprobs(answer, 0, self._num_tokens(answer, answer.text, 0))
            choices.append(
                {"index": i, "message": message, "finish_reason": answer.finish_reason, "logprobs": logprobs}
            )
        return self._head("chat.completion") | {"choices": choices, "usage": _usage(answers)}

    async def events(self, updates: AsyncIterator[tuple[int, Answer]], first: tuple[int, Answer]) -> AsyncIterator[str]:
        """The events of a stream; ``updates`` are (index of an answer, the answer so far) and follow ``first``."""
        finals: dict[int, Answer] = {}
        sent, num_tokens = [""] * self.body.n, [0] * self.body.n
        for i in range(self.body.n):
            yield self._event(i, {"role": "assistant", "content": ""})
        try:
            i, answer = first
            while True:
                text = answer.text
                text = text if answer.finish_reason else hold_back_partial_stop(text, self.stop_strings)
                if text.startswith(sent[i]) and text != sent[i]:
                    num = self._num_tokens(answer, text, num_tokens[i])
                    yield self._event(i, {"content": text[len(sent[i]) :]}, self._logprobs(answer, num_tokens[i], num))
                    sent[i], num_tokens[i] = text, num
                if answer.finish_reason:
                    finals[i] = answer
                    yield self._event(i, self._boxes(answer), finish_reason=answer.finish_reason)
                if len(finals) == self.body.n:
                    break
                i, answer = await anext(updates)
            if self.body.stream_options.include_usage:
                yield self._data({"choices": [], "usage": _usage([finals[i] for i in range(self.body.n)])})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        finally:
            await updates.aclose()

    def _boxes(self, answer: Answer) -> dict[str, Any]:
        return {"boxes": box_fields(answer.text)} if self.has_boxes else {}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        return self._data({"choices": [choice]} | usage)

    def _data(self, fields: dict[str, Any]) -> str:
        return f"data: {json.dumps(self._head('chat.completion.chunk') | fields)}\n\n"

    def _num_tokens(self, answer: Answer, text: str, start: int) -> int:
        """The number of an answer's tokens that are needed for ``text``, with which its text begins; from ``start``."""
        if not self.body.logprobs:
            return 0
        counts, decode, text = range(start, len(answer.ids)), answer.decode, text.rstrip()
        return start + bisect.bisect_left(counts, True, key=lambda n: decode(answer.ids[:n]).startswith(text))

    def _logprobs(self, answer: Answer, start: int, stop: int) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = []
        for token_id, (logprob, top) in zip(answer.ids[start:stop], answer.logprobs[start:stop], strict=True):
            alternatives = [self._token(*alternative) for alternative in top]
            content.append(self._token(token_id, logprob) | {"top_logprobs": alternatives})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokens = self.vocabulary.tokens
        data = tokens.decode_bytes([token_id]) if token_id < tokens.vocab_size else b""
        text = data.decode(errors="backslashreplace")  # part of a character is written as \xe4
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}  # JSON has no infinity


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts of tokens; several answers have one prompt."""
    prompt, completion = answers[0].prompt_tokens, sum(len(answer.ids) for answer in answers)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage | {"prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens}}

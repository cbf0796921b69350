"""Answers by a language model on a server of its own: images are encoded here, whole prompts sent as embeddings.

The server is vLLM, or one that takes its requests: /v1/completions with ``prompt_embeds`` and ``return_token_ids``.
"""

import base64
import io
import itertools
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import httpx
import torch
from torch import Tensor

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation.answer_batch import Answer, AnswerBatch, Plan
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions, Token
from minigpt4.conversation.sampling import TOP_K

Update = tuple[list[int], str | None]  # new token ids, and the server's reason of their end
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 300.0
_PROBE_SECONDS, _PROBE_INTERVAL_SECONDS = 1.0, 5.0  # of the question whether the server still answers
_STEP_SECONDS = 0.02  # for which a step waits for tokens, and new requests for it


class RemoteError(UserError):
    """The language model's server cannot be reached, refuses a request, or breaks off an answer."""


class LanguageModelServer:
    """An OpenAI-compatible server of a plain language model.

    Args:
        url: with or without ``/v1``.
        api_key: sent to the server.

    Raises RemoteError unless it answers, with one model.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        # A kept connection may be closed while it is used again.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)
        self._lock, self._probed, self._problem = threading.Lock(), -math.inf, ""
        self.model, self.max_length = self._find_model()

    def _find_model(self, **timeout: float) -> tuple[str, int]:
        with self._explained():
            response = self._client.get(f"{self.url}/models", **timeout)
            self._check(response)
            models = response.json()["data"]
            if len(models) != 1:
                raise self._error(f"has {len(models)} models; start one with the language model alone")
            return str(models[0]["id"]), int(models[0].get("max_model_len") or 2**31)

    def problem(self) -> str:
        """Why the server does not answer now, without its address; empty if it does. It is asked every few seconds."""
        with self._lock:
            if time.monotonic() - self._probed < _PROBE_INTERVAL_SECONDS:
                return self._problem
            previous, self._problem = self._problem, ""
            try:
                if (model := self._find_model(timeout=_PROBE_SECONDS)[0]) != self.model:
                    raise self._error(f"now has the model {model} in place of {self.model}; restart demo.py")
            except RemoteError as error:
                self._problem = str(error).replace(f" {self.url}", "")
                if self._problem != previous:
                    logging.warning("%s", error)
            self._probed = time.monotonic()
            return self._problem

    def complete(self, embeds: Tensor, eos_ids: Sequence[int], options: GenerationOptions) -> Iterator[Update]:
        """Yields the tokens that follow LM inputs [T, L]; closing the iterator ends the answer on the server, too."""
        data = io.BytesIO()
        torch.save(embeds.detach().cpu().clone(), data)
        body = {"model": self.model, "prompt_embeds": base64.b64encode(data.getvalue()).decode(), "stream": True}
        body |= {"max_tokens": options.max_new_tokens, "return_token_ids": True, "stop_token_ids": list(eos_ids)}
        body |= {name: getattr(options, name) for name in ("presence_penalty", "frequency_penalty")}
        body |= {"repetition_penalty": options.repetition_penalty, "temperature": 0}
        if options.do_sample:
            body |= {"temperature": options.temperature, "top_p": max(options.top_p, 1e-6), "top_k": TOP_K}
        if options.seed is not None:
            body["seed"] = options.seed % 2**63
        with self._explained(), self._client.stream("POST", f"{self.url}/completions", json=body) as response:
            self._check(response)
            for line in _lines(response.iter_bytes()):
                name, _, content = line.partition(b":")
                if name != b"data":
                    continue
                if content.strip() == b"[DONE]":
                    break
                chunk = json.loads(content)
                if "error" in chunk:
                    raise self._error(f"broke off the answer ({_message(chunk)})")
                for choice in chunk["choices"]:
                    if (reason := choice.get("finish_reason")) not in (None, "stop", "length"):
                        raise self._error(f"broke off the answer ({reason})")
                    yield [int(number) for number in choice["token_ids"]], reason
                    if reason:
                        return
            raise self._error("broke off the answer before its end")

    def _error(self, problem: str) -> RemoteError:
        return RemoteError(f"The language model's server {self.url} {problem}.")

    def _check(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            response.read()
            try:
                message = _message(response.json())
            except ValueError:
                message = response.text[:200]
            raise self._error(f"answers with status {response.status_code} ({message.rstrip('.')})")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except httpx.TimeoutException as error:
            raise self._error(f"gives no answer in time ({type(error).__name__})") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            is_broken = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
            verb = "broke off the connection" if is_broken else "cannot be reached"
            raise self._error(f"{verb} ({error})") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = "sends something else than vLLM's answers with token_ids"
            raise self._error(f"{problem} ({type(error).__name__}: {error})") from error


def _lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines; httpx's own also end at characters that a token's text may contain."""
    rest = b""
    for data in parts:
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _message(content: Any) -> str:
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


class RemoteBatch(AnswerBatch):
    """Conversations that a server's language model answers; one thread reads each answer.

    Args:
        chat: its model may have the LM's token embeddings alone.
        server: has the same LM. RemoteError if it refuses embeddings, or those of this LM.
        max_length: of prompt and answer in tokens, as far as the server allows it.
    """

    def __init__(self, chat: Chat, server: LanguageModelServer, max_length: int = 2000) -> None:
        super().__init__(chat, min(max_length, server.max_length), shortens_answers=True)
        self._server, self._numbers = server, itertools.count()
        self._updates: queue.SimpleQueue[tuple[int, Update | Exception]] = queue.SimpleQueue()
        self._num_tokens = chat.model.llama_model.get_input_embeddings().num_embeddings
        first = torch.tensor([chat.model.bos_ids or [0]], device=chat.device)
        embeds, options = chat.model.embed_inputs(first)[0], GenerationOptions(max_new_tokens=1, do_sample=False)
        for ids, _ in server.complete(embeds, chat.model.eos_ids, options):
            self._check_ids(ids)

    @property
    def problem(self) -> str:
        """That of the server."""
        return self._server.problem()

    def plan(self, conv: Conversation, num_images: int, options: GenerationOptions) -> Plan:
        """As for answers of this process; UserError for what a server of token ids cannot do."""
        if options.logits_processors or options.top_logprobs is not None or options.num_beams > 1:
            names = "logprobs, logit_bias, response_format and beam search"
            raise UserError(f"{names} are not available where the language model has a server of its own (--lm-url).")
        return super().plan(conv, num_images, options)

    def add(self, conv: Conversation, images: Sequence[Tensor], plan: Plan) -> Answer:
        """Sends a conversation with its images [1, Q, L] to the server; its answer grows with each step."""
        answer = super().add(conv, images, plan)
        row, number = self._waiting.pop(), next(self._numbers)
        row.number, self._running[number] = number, row
        arguments = (number, row.ids, row.images, row.plan.options)
        threading.Thread(target=self._read, args=arguments, name=f"answer {number}", daemon=True).start()
        return answer

    def step(self) -> list[Answer]:
        """The answers that grew; waits a moment for one."""
        grown: dict[int, Answer] = {}
        try:
            number, update = self._updates.get(timeout=_STEP_SECONDS)
            while True:
                if number in self._running:  # else it was removed
                    grown[number] = self._grow(number, update)
                number, update = self._updates.get_nowait()
        except queue.Empty:
            return list(grown.values())

    def remove(self, answer: Answer) -> None:
        """Ends an answer; what has been generated is kept."""
        number = next(number for number, row in self._running.items() if row.answer is answer)
        self._running.pop(number).end()

    def _read(self, number: int, ids: list[int], images: list[Tensor], options: GenerationOptions) -> None:
        try:
            devices.use(self.chat.device)
            prompt = torch.tensor([ids], device=self.chat.device)
            with torch.inference_mode():
                embeds = self.chat.model.embed_inputs(prompt, torch.cat(images) if images else None)[0]
            with closing(self._server.complete(embeds, self.chat.model.eos_ids, options)) as updates:
                for new_ids, reason in updates:
                    self._check_ids(new_ids)
                    self._updates.put((number, (new_ids, reason)))
                    if number not in self._running:
                        break
        except Exception as error:  # the engine tells the client, and logs what is no UserError
            self._updates.put((number, error))

    def _check_ids(self, ids: Sequence[int]) -> None:
        if any(not 0 <= number < self._num_tokens for number in ids):
            raise RemoteError(f"The server at {self._server.url} has another language model: it sends unknown tokens.")

    def _grow(self, number: int, update: Update | Exception) -> Answer:
        row, is_error = self._running[number], isinstance(update, Exception)
        answer = row.answer
        if is_error:
            logging.warning("An answer failed: %s", update)
            answer.error = update
        for token_id in () if is_error else update[0]:
            is_end = token_id in self.chat.model.eos_ids or row.plan.options.stop([*answer.ids, token_id])
            row.grow(Token(number, token_id, is_end))
            if answer.finish_reason:
                break
        if not answer.finish_reason:
            answer.finish_reason = "stop" if is_error else update[1]
        if answer.finish_reason:
            self._running.pop(number).end()
        return answer

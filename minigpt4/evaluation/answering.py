"""Who answers: the model of this process, in batches that share images, or any OpenAI-compatible server."""

import base64
import logging
import mimetypes
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import httpx
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.dist_utils import is_main_process
from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.evaluation.answers import AnswerFile, question_fields
from minigpt4.evaluation.boxes import NUM_FREE_ROUNDS
from minigpt4.evaluation.items import BenchmarkConfig, Item, Row
from minigpt4.models.candidates import candidate_losses
from minigpt4.serve.batch import Question, stream_answers

AskAgain = Callable[[str, str], str | None]  # question and answer to the next question
MAX_ROUNDS = 1 + NUM_FREE_ROUNDS
_FILLER = "none"  # the candidate with which the reference fills up rows that have fewer than others
_RETRIES, _TIMEOUT_SECONDS = 5, 300.0


class Answerer(Protocol):
    """Answers items in their order; rows have ``question_id`` and ``answer`` or ``error``."""

    def __call__(self, items: Sequence[Item], section: BenchmarkConfig) -> Iterator[list[Row]]:
        """Yields finished rows, some at a time."""


def prompt_of(item: Item, section: BenchmarkConfig) -> str:
    """The text of an item's question."""
    return (section.prompt or "{question}").replace("{question}", item.question)


def by_image(items: Sequence[Item]) -> list[Item]:
    """The items in the order of their images, so that each image is encoded once."""
    order = {image: number for number, image in enumerate(dict.fromkeys(item.image for item in items))}
    return sorted(items, key=lambda item: order[item.image])


class LocalModel:
    """Answers with a chat's model, greedily or by beams."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def __call__(self, items: Sequence[Item], section: BenchmarkConfig) -> Iterator[list[Row]]:
        """Yields finished rows."""
        with self._system(section.system):
            yield from (self._rank if items and items[0].candidates else self._generate)(items, section)

    def example(self, item: Item, section: BenchmarkConfig) -> str:
        """The whole prompt of an item, as the language model reads it."""
        with self._system(section.system):
            return self._prompt(item, section)

    @contextmanager
    def _system(self, text: str | None) -> Iterator[None]:
        template = self.chat.template
        self.chat.template = template.copy()
        if text == "":
            self.chat.template.system = ""
        elif text:
            self.chat.template.add_system(text)
        try:
            yield
        finally:
            self.chat.template = template

    def _prompt(self, item: Item, section: BenchmarkConfig) -> str:
        conv = self.chat.template.copy()
        conv.ask_with_images(f"{IMAGE_PLACEHOLDER}{prompt_of(item, section)}")
        conv.append_message(conv.roles[1], None)
        return conv.get_prompt()

    def _generate(self, items: Sequence[Item], section: BenchmarkConfig) -> Iterator[list[Row]]:
        settings = {"num_beams": section.num_beams, "max_new_tokens": section.max_new_tokens}
        options = GenerationOptions(do_sample=False, repetition_penalty=1.0, **settings)  # as in the reference's
        questions = [Question({"question_id": item.id}, item.image, prompt_of(item, section)) for item in items]
        yield from stream_answers(self.chat, questions, options, section.batch_size)

    def _rank(self, items: Sequence[Item], section: BenchmarkConfig) -> Iterator[list[Row]]:
        for start in range(0, len(items), section.batch_size):
            batch = items[start : start + section.batch_size]
            pixels, errors = {}, {}
            for image in dict.fromkeys(item.image for item in batch):
                try:
                    pixels[image] = self.chat.preprocess_image(image)
                except UserError as error:
                    errors[image] = str(error)
            embeds = list(pixels.values())
            self.chat.encode_img(embeds)
            images = dict(zip(pixels, embeds, strict=True))
            yield [
                {"question_id": item.id, "error": errors[item.image]}
                if item.image in errors
                else self._rank_candidates(item, images[item.image], section)
                for item in batch
            ]

    def _rank_candidates(self, item: Item, embeds: Tensor, section: BenchmarkConfig) -> Row:
        model, prompt = self.chat.model, self._prompt(item, section)
        texts = [*item.candidates, _FILLER]
        rows = model.tokenize_rows(texts, [prompt] * len(texts))
        prompt_length = len(model.bos_ids) + len(model.tokenize_prompt(prompt))
        lengths = [len(row.ids) - prompt_length for row in rows]
        losses = candidate_losses(model, rows[:-1], embeds)
        num_tokens = [sum(label >= 0 for label in row.labels) for row in rows[:-1]]
        answer = item.candidates[min(range(len(losses)), key=lambda i: losses[i] / num_tokens[i])]
        return {
            **{"question_id": item.id, "answer": answer, "losses": losses, "num_tokens": num_tokens},
            **{"target_lengths": lengths, "prompt_length": prompt_length},
        }


class Server:
    """Answers with an OpenAI-compatible server.

    Args:
        url: with or without ``/v1``.
        model: its name there; None: the only one that the server lists.
        api_key: sent to the server.
        stop: text at which answers end; they are cut there, as some servers leave it or do not stop.
        end_sym: text that is reported if answers have it, though no ``stop`` was given.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        stop: str | None = None,
        end_sym: str = "",
    ) -> None:
        base = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        limits = httpx.Limits(max_keepalive_connections=0)  # a kept connection may be closed while it is used again
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, limits=limits)
        self.model = model or self._only_model()
        self._stop, self._unexpected = stop, "" if stop else end_sym.strip()
        # As ``LocalModel``, until the server refuses a field.
        self._fields: dict[str, Any] = {"repetition_penalty": 1.0} | ({"stop": [stop]} if stop else {})

    def _only_model(self) -> str:
        models = [row.get("id") for row in self._request("GET", "/models").get("data", [])]
        if len(models) != 1:
            raise UserError(f"--api-url: {self.url} has {len(models)} models; name one with --api-model.")
        return models[0]

    @staticmethod
    def check(name: str, items: Sequence[Item], section: BenchmarkConfig) -> None:
        """Raises UserError if a section asks for what no server does; before the first one is answered."""
        where = f"evaluation_datasets.{name}"
        if items[0].candidates:
            raise UserError(f"--api-url: a server cannot rank the candidates of {where}; leave it out with --dataset.")
        for key, wrong in (("num_beams", section.num_beams > 1), ("system", section.system == "")):
            if wrong:
                text = f"{where}.{key}: {getattr(section, key)!r} cannot be asked of a server"
                raise UserError(f"--api-url: {text}; remove it from the section, and set it where the server starts.")

    def __call__(self, items: Sequence[Item], section: BenchmarkConfig) -> Iterator[list[Row]]:
        """Yields finished rows; an answer that the server refuses is an error of its row."""
        with ThreadPoolExecutor(section.batch_size) as pool:
            yield from ([row] for row in pool.map(lambda item: self._ask(item, section), items))

    def _ask(self, item: Item, section: BenchmarkConfig) -> Row:
        try:
            data, kind = Path(item.image).read_bytes(), mimetypes.guess_type(item.image)[0] or "image/jpeg"
        except OSError as error:
            return {"question_id": item.id, "error": f"{item.image} cannot be read ({error.strerror})."}
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt_of(item, section)}]
        messages = [{"role": "system", "content": section.system}] if section.system else []
        body = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        body |= {"temperature": 0, "max_tokens": section.max_new_tokens}
        try:
            answer = self._complete(body)["choices"][0]["message"]["content"] or ""
        except _Refused as error:
            return {"question_id": item.id, "error": str(error)}
        if self._unexpected and self._unexpected in answer:
            text = "Answers of the server have %r, which is model.end_sym; --api-stop %r cuts them there."
            logging.warning(text, self._unexpected, self._unexpected)
            self._unexpected = ""
        return {"question_id": item.id, "answer": answer.partition(self._stop)[0].strip() if self._stop else answer}

    def _complete(self, body: dict) -> dict:
        """The server's response to a question, without the fields that it does not accept."""
        while True:
            fields = self._fields
            try:
                return self._request("POST", "/chat/completions", body | fields)
            except _Refused as error:
                refused = [name for name in fields if name in str(error)] or [name for name in fields if name == "stop"]
                if not refused:
                    raise
                self._fields = {name: value for name, value in fields.items() if name not in refused}

    def _request(self, method: str, path: str, body: dict | None = None) -> dict:
        """The server's JSON; waits and asks again where it is busy."""
        for attempt in range(_RETRIES + 1):
            try:
                response = self._client.request(method, self.url + path, json=body)
            except httpx.HTTPError as error:
                raise UserError(f"--api-url: {self.url} does not answer ({error}); correct it, or start it.") from error
            if response.status_code not in (429, 503) or attempt == _RETRIES:
                break
            wait = response.headers.get("Retry-After", "")
            time.sleep(min(float(wait) if wait.isdecimal() else 2.0**attempt, 60))
        fails_by_stop = response.status_code == 500 and "stop" in (body or {})  # ``transformers serve`` 5.24
        if response.status_code in (400, 413, 422) or fails_by_stop:
            raise _Refused(f"The server refused it ({response.status_code}: {response.text[:300]}).")
        if response.status_code != 200:
            text = f"status {response.status_code} ({response.text[:300]})"
            raise UserError(
                f"--api-url: {self.url}{path} answers with {text}; correct the address, the model or the key."
            )
        return response.json()


class _Refused(UserError):
    """The server does not accept one question."""


def answer_all(
    answerer: Answerer, items: Sequence[Item], section: BenchmarkConfig, file: AnswerFile, ask_again: AskAgain | None
) -> None:
    """Asks what the file has no answer to; ``ask_again`` gives the next round's question, None where it is over."""
    asked = list(items)
    for number in range(MAX_ROUNDS if ask_again else 1):
        waiting = by_image([item for item in asked if (item.id, number) not in file.rows])
        own = {item.id: item for item in waiting}
        places = {"total": len(asked), "initial": len(asked) - len(waiting), "disable": not is_main_process()}
        with tqdm(**places, unit="question", desc=file.name) as bar:
            for rows in answerer(waiting, section) if waiting else ():
                rounds = {"round": number} if number else {}
                file.append([question_fields(own[str(row["question_id"])]) | row | rounds for row in rows])
                bar.update(len(rows))
        if ask_again:
            answers = [str(file.rows[item.id, number].get("answer", "")) for item in asked]
            pairs = [(item, ask_again(item.question, answer)) for item, answer in zip(asked, answers, strict=True)]
            asked = [replace(item, question=question) for item, question in pairs if question is not None]

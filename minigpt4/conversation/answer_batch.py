"""Continuous batching: conversations that are answered together, which join and leave at any step."""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.common.templates import Conversation
from minigpt4.conversation.context import Context, build_context
from minigpt4.conversation.generation import DecodingState, Logprobs, Token, stream
from minigpt4.conversation.prefix_cache import Prefix
from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.models.growing_cache import join_caches, new_cache
from minigpt4.models.language_model import next_token_logits

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat

PREFILL_TOKENS = 512  # of a step: longer contexts are prefilled in parts, so that answers continue in between
USUAL_ANSWER = 256  # tokens; with ``shortens_answers``, turns are left out for so many and not for the longest answer


@dataclass
class Answer:
    """An answer while it is generated; ``decode`` maps its token ids to text."""

    prompt_tokens: int  # images included
    cached_tokens: int  # of the prompt's; they were prefilled in an earlier turn
    decode: Callable[[Sequence[int]], str]
    num_dropped_turns: int = 0  # the oldest ones, which did not fit into the context
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # one per id, where ``options.top_logprobs`` asks for them
    finish_reason: str | None = None  # "stop", or "length" at max_new_tokens
    seconds: float = 0.0  # from the start to the latest token
    seconds_to_first_token: float = 0.0

    @property
    def text(self) -> str:
        """The text so far; it is decoded on access, so that callers who wait for the end pay once."""
        return self.decode(self.ids)


@dataclass
class Plan:
    """What an answer will need: its prompt, and options that fit beside it."""

    context: Context
    options: GenerationOptions

    @property
    def num_tokens(self) -> int:
        """Positions of prompt and longest answer."""
        return len(self.context.ids) + self.options.max_new_tokens


@dataclass(eq=False)
class _Row:
    conv: Conversation
    images: list[Tensor]
    plan: Plan
    answer: Answer
    prefix: Prefix | None = None  # from the first step on
    embeds: Tensor | None = None  # LM inputs [1, T, L] until they are prefilled
    start: float = field(default_factory=time.perf_counter)

    def grow(self, token: Token) -> None:
        """Adds a token to the answer."""
        answer = self.answer
        answer.ids.append(token.id)
        answer.logprobs += [token.logprobs] if token.logprobs else []
        answer.seconds = time.perf_counter() - self.start
        answer.seconds_to_first_token = answer.seconds_to_first_token or answer.seconds
        if token.is_end:
            answer.finish_reason = "stop"
        elif len(answer.ids) >= self.plan.options.max_new_tokens:
            answer.finish_reason = "length"

    def end(self) -> None:
        """Adds the answer to the conversation, if there is one."""
        if self.answer.ids:
            self.conv.append_message(self.conv.roles[1], self.answer.text)

    @property
    def ids(self) -> list[int]:
        return self.plan.context.ids

    @property
    def num_remaining(self) -> int:
        """Positions to prefill."""
        return len(self.ids) - self.prefix.cache.get_seq_length()


class AnswerBatch:
    """Conversations that are answered together, one token per step; each continues from its chat's cached prefix.

    Answers are those that each conversation gets alone, up to rounding. It is used by one thread.

    Args:
        chat: its model, stop strings and prefix cache are used.
        max_length: of prompt and answer in tokens; beyond it, prompts leave out their oldest turns.
        max_tokens: positions of all rows together, padding included: what the key-value cache may hold.
        shortens_answers: whether an answer gets the room that its prompt leaves, where this is less than
            ``max_new_tokens``; otherwise the prompt is shortened, or refused.
    """

    def __init__(
        self, chat: "Chat", max_length: int = 2000, max_tokens: float = math.inf, shortens_answers: bool = False
    ) -> None:
        self.chat, self.max_length, self.max_tokens = chat, max_length, max_tokens
        self.shortens_answers = shortens_answers
        self._clear()

    def _clear(self) -> None:
        model = self.chat.model
        self._state = DecodingState(model.llama_model, model.bos_ids, model.eos_ids)
        self._waiting: deque[_Row] = deque()  # to be prefilled
        self._running: dict[int, _Row] = {}  # by their numbers in the state
        self._prefills = False  # whether the last step did

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def plan(self, conv: Conversation, num_images: int, options: GenerationOptions) -> Plan:
        """Tokenizes a conversation that ends with a question; UserError where it cannot be answered."""

        def build(num_new_tokens: int) -> Context:
            return build_context(self.chat.model, conv, num_images, self.max_length - num_new_tokens)

        if not self.shortens_answers:
            return Plan(build(options.max_new_tokens), options)
        try:
            context = build(min(options.max_new_tokens, USUAL_ANSWER))
        except UserError:  # the last question alone is longer
            context = build(1)
        room = self.max_length - len(context.ids)
        return Plan(context, replace(options, max_new_tokens=min(options.max_new_tokens, room)))

    def has_room(self, plans: Sequence[Plan]) -> bool:
        """Whether further rows would fit into ``max_tokens`` to the end of the longest answer; a single one always."""
        needed = [
            plan.num_tokens for plan in (*plans, *(row.plan for row in (*self._waiting, *self._running.values())))
        ]
        return len(needed) == 1 or len(needed) * max(needed) <= self.max_tokens

    def add(self, conv: Conversation, images: Sequence[Tensor], plan: Plan) -> Answer:
        """Adds a conversation with its images [1, Q, L]; its answer grows with each step and is appended at the end."""
        ids, num_dropped = plan.context
        answer = Answer(len(ids), 0, functools.partial(self.chat.decode_answer, conv=conv), num_dropped)
        plan = replace(plan, options=replace(plan.options, stop=self.chat.stop_function(conv, plan.options.stop)))
        self._waiting.append(_Row(conv, list(images), plan, answer))
        return answer

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Prefills a part of what is new or, in turns, decodes a token for each row; returns the answers that grew.

        A beam search gives all its tokens at once. An exception, such as out of memory, ends all answers.
        """
        if not len(self):
            return []
        devices.use(self.chat.device)  # the threads of a server start on the first device
        self._prefills = bool(self._waiting) and not (self._prefills and self._running)
        try:
            tokens = self._prefill() if self._prefills else self._state.step()
        except BaseException:  # some layers of the cache may be ahead of others
            for row in (*self._waiting, *self._running.values()):
                row.end()
            self._clear()
            raise
        rows = {token.row: self._running[token.row] for token in tokens}
        for token in tokens:
            rows[token.row].grow(token)
        for number, row in rows.items():
            if row.answer.finish_reason:
                self._running.pop(number).end()
        return [row.answer for row in rows.values()]

    def remove(self, answer: Answer) -> None:
        """Ends an answer; what has been generated is kept."""
        for number in [number for number, row in self._running.items() if row.answer is answer]:
            self._state.remove([number])
            self._running.pop(number).end()
        for row in [row for row in self._waiting if row.answer is answer]:
            self._waiting.remove(row)
            if row.prefix is not None:
                self._store(row, row.prefix.cache)
            row.end()

    def close(self) -> None:
        """Ends all answers."""
        for row in (*self._waiting, *self._running.values()):
            self.remove(row.answer)

    def _prefill(self) -> list[Token]:
        """Prefills the first waiting contexts, together if they are short; returns their first tokens."""
        group: list[_Row] = []
        while self._waiting:
            row = self._waiting[0]
            if row.prefix is None:
                self._start(row)
            longest = max(row.num_remaining, *(other.num_remaining for other in group), 0)
            if group and ((1 + len(group)) * longest > PREFILL_TOKENS or row.plan.options.num_beams > 1):
                break
            self._waiting.popleft()
            if row.num_remaining > PREFILL_TOKENS:
                done = row.prefix.cache.get_seq_length()
                part = row.embeds[:, done : done + PREFILL_TOKENS]
                mask = torch.ones(1, done + PREFILL_TOKENS, dtype=torch.long)
                next_token_logits(self.chat.model.llama_model, part, mask, row.prefix.cache)
                self._waiting.append(row)  # others come first
                return []
            if row.plan.options.num_beams > 1:
                return self._search_beams(row)
            group.append(row)
        return self._join(group)

    def _start(self, row: _Row) -> None:
        row.prefix = self.chat.prefixes.take(row.ids, row.images, row.conv.owner)
        row.answer.cached_tokens = len(row.prefix.ids)
        ids = torch.tensor([row.ids], device=self.chat.device)
        row.embeds = self.chat.model.embed_inputs(ids, torch.cat(row.images) if row.images else None)

    def _join(self, group: list[_Row]) -> list[Token]:
        """Prefills the last positions of several contexts, which then are decoded.

        All get as many positions, so that none has padding between its cached and its new ones, which would be too far
        apart for sliding windows: rows with fewer new ones compute some again.
        """
        count = max(row.num_remaining for row in group)
        embeds, lengths = [], [len(row.ids) for row in group]
        for row, length in zip(group, lengths, strict=True):
            row.prefix.cache.crop(min(0, row.num_remaining - count))
            embeds.append(pad(row.embeds, (0, 0, max(0, count - length), 0))[:, -count:])
            row.embeds = None
        cache = join_caches([row.prefix.cache for row in group])
        total = cache.get_seq_length() + count
        mask = torch.stack([(torch.arange(total) >= total - length).long() for length in lengths])
        options = [row.plan.options for row in group]
        on_leave = [functools.partial(self._store, row) for row in group] if self.chat.prefixes.num_chats else None
        tokens = self._state.add(torch.cat(embeds), mask, options, cache, on_leave)
        self._running |= {token.row: row for token, row in zip(tokens, group, strict=True)}
        return tokens

    def _store(self, row: _Row, cache: DynamicCache) -> None:
        row.prefix.cache = cache
        self.chat.prefixes.put(row.prefix, row.ids + row.answer.ids, row.images)

    def _search_beams(self, row: _Row) -> list[Token]:
        """Answers one row by beam search, to its end."""
        model, mask = self.chat.model, torch.ones(1, len(row.ids), dtype=torch.long)
        embeds = row.embeds[:, -row.num_remaining :]
        arguments = (embeds, mask, row.plan.options, model.bos_ids, model.eos_ids, row.prefix.cache)
        tokens = [token._replace(row=-1) for token in stream(model.llama_model, *arguments)]
        self._store(row, row.prefix.cache)
        self._running[-1] = row  # until it ends, in this step
        return tokens


def tokens_that_fit(chat: "Chat") -> int:
    """Positions of a batch whose key-value cache fits into the free memory, beside kept chats and images.

    Twice the memory is reckoned: half as many positions may belong to kept chats, and buffers have room to grow.
    """
    llm, cache = chat.model.llama_model, new_cache()
    embeds = llm.get_input_embeddings().weight[:1, None].detach()
    with torch.no_grad():
        next_token_logits(llm, embeds, torch.ones(1, 1, dtype=torch.long), cache)
    num_bytes = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    return int(0.8 * devices.memory_left(chat.device)[1] / (2 * num_bytes))

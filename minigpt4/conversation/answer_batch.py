"""Continuous batching: conversations that are answered together, which join and leave at any step."""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.common.templates import Conversation
from minigpt4.conversation.beam_search import search_beams
from minigpt4.conversation.context import Context, build_context
from minigpt4.conversation.generation import DecodingState, Logprobs, Token, tokens_of
from minigpt4.conversation.prefix_cache import Prefix
from minigpt4.conversation.sampling import Generated, GenerationOptions
from minigpt4.models.growing_cache import copy_cache, join_caches, new_cache
from minigpt4.models.language_model import next_token_logits

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat

MIN_SHARED_TOKENS = 128  # that rows with a common beginning save together, if it is prefilled apart
PREFILL_TOKENS = 512  # of a step: longer contexts are prefilled in parts, so that answers continue in between
NUM_USUAL_TOKENS = 256  # with ``shortens_answers``, turns are left out for so many and not for the longest answer


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
    error: Exception | None = None  # what one of the options' functions raised, which ended the answer
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
        """Positions of prompt and longest answer, for each beam."""
        return self.options.num_beams * (len(self.context.ids) + self.options.max_new_tokens)


@dataclass(eq=False)
class _Row:
    conv: Conversation
    images: list[Tensor]
    plan: Plan
    answer: Answer
    prefix: Prefix | None = None  # from the first step on
    number: int | None = None  # in the decoding state
    embeds: Tensor | None = None  # LM inputs [1, T, L] until they are prefilled
    start: float = field(default_factory=time.perf_counter)

    def grow(self, token: Token) -> None:
        """Adds a token to the answer."""
        answer = self.answer
        answer.ids.append(token.id)
        answer.logprobs += [token.logprobs] if token.logprobs else []
        answer.seconds = time.perf_counter() - self.start
        answer.seconds_to_first_token = answer.seconds_to_first_token or answer.seconds
        answer.error = token.error
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

    problem = ""  # why nothing can be answered now, as a sentence; any thread may ask

    def __init__(
        self, chat: "Chat", max_length: int = 2000, max_tokens: float = math.inf, shortens_answers: bool = False
    ) -> None:
        self.chat, self.max_length, self.max_tokens = chat, max_length, max_tokens
        self.shortens_answers = shortens_answers
        self.clear()

    def clear(self) -> None:
        """Forgets all conversations."""
        model, record = self.chat.model, devices.recorder(self.chat.device) if self.chat.records_steps else None
        self._state = DecodingState(model.llama_model, model.bos_ids, model.eos_ids, record)
        self._waiting: deque[_Row] = deque()  # to be prefilled
        self._shared: Prefix | None = None  # the common beginning of the latest contexts
        self._searching: deque[tuple[_Row, Generator[None, None, Generated]]] = deque()  # with beams
        self._running: dict[int, _Row] = {}  # by their numbers in the state
        turns = (self._waiting, self._prefill), (self._searching, self._search), (self._running, self._decode)
        self._turns = deque(turns)

    @property
    def _rows(self) -> list[_Row]:
        return [*self._waiting, *(row for row, _ in self._searching), *self._running.values()]

    def __len__(self) -> int:
        return len(self._rows)

    def plan(self, conv: Conversation, num_images: int, options: GenerationOptions) -> Plan:
        """Tokenizes a conversation that ends with a question; UserError where it cannot be answered."""

        def build(num_new_tokens: int) -> Context:
            return build_context(self.chat.model, conv, num_images, self.max_length - num_new_tokens)

        if not self.shortens_answers:
            return Plan(build(options.max_new_tokens), options)
        try:
            context = build(min(options.max_new_tokens, NUM_USUAL_TOKENS))
        except UserError:  # the last question alone is longer
            context = build(1)
        room = self.max_length - len(context.ids)
        return Plan(context, replace(options, max_new_tokens=min(options.max_new_tokens, room)))

    def has_room(self, plans: Sequence[Plan]) -> bool:
        """Whether further rows would fit into ``max_tokens`` to the end of the longest answer; a single one always."""
        needed = [plan.num_tokens for plan in (*plans, *(row.plan for row in self._rows))]
        return len(needed) == 1 or len(needed) * max(needed) <= self.max_tokens

    def add(self, conv: Conversation, images: Sequence[Tensor], plan: Plan) -> Answer:
        """Adds a conversation with its images [1, Q, L]; its answer grows with each step and is appended at the end."""
        ids, num_dropped = plan.context
        answer = Answer(len(ids), 0, functools.partial(self.chat.decode_answer, conv=conv), num_dropped)
        options = self.chat.with_defaults(plan.options)
        plan = replace(plan, options=replace(options, stop=self.chat.stop_function(conv, options.stop)))
        self._waiting.append(_Row(conv, list(images), plan, answer))
        return answer

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Does one thing in turns, where there is something to do; returns the answers that grew.

        It prefills a part of what is new, goes on with a beam search, or decodes a token for each row. A beam search
        gives all its tokens at its end. An exception, such as out of memory, ends all answers.
        """
        if not len(self):
            return []
        devices.use(self.chat.device)  # the threads of a server start on the first device
        while not self._turns[0][0]:
            self._turns.rotate(-1)
        advance = self._turns[0][1]
        self._turns.rotate(-1)
        try:
            grown = advance()
        except BaseException:  # some layers of the cache may be ahead of others
            for row in self._rows:
                row.end()
            self.clear()
            raise
        for row, token in grown:
            row.grow(token)
        rows = list(dict.fromkeys(row for row, _ in grown))
        for row in rows:
            if row.answer.finish_reason:
                self._running.pop(row.number, None)
                row.end()
        return [row.answer for row in rows]

    def remove(self, answer: Answer) -> None:
        """Ends an answer; what has been generated is kept."""
        row = next(row for row in self._rows if row.answer is answer)
        if row.number is not None:
            self._state.remove([row.number])
            del self._running[row.number]
        elif row in self._waiting:
            self._waiting.remove(row)
            if row.prefix is not None:
                self._store(row, row.prefix.cache)
        else:
            self._searching.remove(next(search for search in self._searching if search[0] is row))
        row.end()

    def close(self) -> None:
        """Ends all answers."""
        for row in self._rows:
            self.remove(row.answer)

    def _prefill(self) -> list[tuple[_Row, Token]]:
        """Prefills the first waiting contexts, together if they are short; returns their first tokens."""
        first = self._waiting.popleft()
        self._start(first)
        self._share(first)
        if first.num_remaining > PREFILL_TOKENS:
            done = first.prefix.cache.get_seq_length()
            part = first.embeds[:, done : done + PREFILL_TOKENS]
            mask = torch.ones(1, done + PREFILL_TOKENS, dtype=torch.long)
            next_token_logits(self.chat.model.llama_model, part, mask, first.prefix.cache)
            self._waiting.append(first)  # others come first
            return []
        if first.plan.options.num_beams > 1:
            model, mask = self.chat.model, torch.ones(1, len(first.ids), dtype=torch.long)
            embeds = first.embeds[:, -first.num_remaining :]
            arguments = (embeds, mask, first.plan.options, model.bos_ids, model.eos_ids, first.prefix.cache)
            self._searching.append((first, search_beams(model.llama_model, *arguments)))
            return []
        group, longest = [first], first.num_remaining
        while self._waiting and self._waiting[0].plan.options.num_beams == 1:
            self._start(row := self._waiting[0])
            apart, longest = len(group) * longest + row.num_remaining, max(longest, row.num_remaining)
            if (1 + len(group)) * longest > min(PREFILL_TOKENS, 2 * apart):
                break
            group.append(self._waiting.popleft())
        return self._join(group)

    def _start(self, row: _Row) -> None:
        """Prepares what is needed to prefill a context, once."""
        if row.prefix is not None:
            return
        length = self._shared_length(row)
        if length > self.chat.prefixes.cached_length(row.ids, row.images, row.conv.owner):
            row.prefix = self._copy_shared(length)
        else:
            row.prefix = self.chat.prefixes.take(row.ids, row.images, row.conv.owner)
            row.answer.cached_tokens = len(row.prefix.ids)
        ids = torch.tensor([row.ids], device=self.chat.device)
        row.embeds = self.chat.model.embed_inputs(ids, torch.cat(row.images) if row.images else None)

    def _share(self, first: _Row) -> None:
        """Prefills what a context has in common with the next ones, where that saves enough; they get copies of it."""
        num_known, length, num_others = len(first.prefix.ids), 0, 0
        whole = Prefix(first.ids[:-1], first.images, owner=first.conv.owner)
        for row in self._waiting:
            common = whole.common_length(row.ids[:-1], row.images) if row.conv.owner == whole.owner else 0
            if row.prefix is not None or common < length:
                break
            length, num_others = length or common, num_others + 1
        if (length - num_known) * num_others < MIN_SHARED_TOKENS or length - num_known > PREFILL_TOKENS:
            return
        mask, cache = torch.ones(1, length, dtype=torch.long), first.prefix.cache
        next_token_logits(self.chat.model.llama_model, first.embeds[:, num_known:length], mask, cache)
        self._shared = Prefix(first.ids[:length], first.images, cache, first.conv.owner)
        first.prefix = self._copy_shared(length)

    def _shared_length(self, row: _Row) -> int:
        """Leading positions of a context that are known from the ones before it."""
        is_known = self._shared is not None and self._shared.owner == row.conv.owner
        return min(self._shared.common_length(row.ids, row.images), len(row.ids) - 1) if is_known else 0

    def _copy_shared(self, length: int) -> Prefix:
        shared = self._shared
        cache = copy_cache(shared.cache, positions=slice(length))
        return Prefix(shared.ids[:length], shared.images, cache, shared.owner)

    def _join(self, group: list[_Row]) -> list[tuple[_Row, Token]]:
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
        for row, token in zip(group, tokens, strict=True):
            row.number = token.row
            self._running[token.row] = row
        return list(zip(group, tokens, strict=True))

    def _store(self, row: _Row, cache: DynamicCache) -> None:
        row.prefix.cache = cache
        self.chat.prefixes.put(row.prefix, row.ids + row.answer.ids, row.images)

    def _search(self) -> list[tuple[_Row, Token]]:
        """Goes on with the next beam search; returns its tokens where it ends."""
        row, steps = self._searching[0]
        self._searching.rotate(-1)
        try:
            next(steps)
            return []
        except StopIteration as end:
            tokens = tokens_of(end.value, -1, row.plan.options, self.chat.model.eos_ids)
        except Exception as error:  # concerns this row only
            tokens = [Token(-1, 0, True, None, error)]
        self._searching.pop()
        if tokens[0].error is None:
            self._store(row, row.prefix.cache)
        return [(row, token) for token in tokens]

    def _decode(self) -> list[tuple[_Row, Token]]:
        """Decodes a token for each row."""
        return [(self._running[token.row], token) for token in self._state.step()]


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

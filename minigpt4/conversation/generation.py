"""Generation from embeddings with transformers' key-value cache: one decoding loop for one or many rows.

Shapes: B rows, t positions to prefill, S cached positions, L width of the LM, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from minigpt4.conversation.sampling import Generated, GenerationOptions, build_processors, build_warpers, sample
from minigpt4.models.growing_cache import copy_cache, new_cache
from minigpt4.models.language_model import next_token_logits
from minigpt4.models.recorded_step import Record, RecordedStep

__all__ = ["DecodingState", "Generated", "GenerationOptions"]


Logprobs = tuple[float, list[tuple[int, float]]]  # of a chosen token, and of the most probable ones with their ids


class Token(NamedTuple):
    """A token that was chosen for a row; ``is_end``: the row ends with it other than by ``max_new_tokens``.

    ``error`` is what a function of the row's options raised: then the row ends, and the token means nothing.
    """

    row: int
    id: int
    is_end: bool
    logprobs: Logprobs | None = None  # where ``options.top_logprobs`` asks for them
    error: Exception | None = None


OnLeave = Callable[[DynamicCache], None]  # gets the cache of a row that leaves, which is then nobody else's


@dataclass
class _Row:
    number: int
    options: GenerationOptions
    processors: LogitsProcessorList
    generator: torch.Generator | None
    on_leave: OnLeave | None = None
    error: Exception | None = None
    ids: list[int] = field(default_factory=list)

    def process(self, logits: Tensor, bos_ids: Sequence[int]) -> Tensor:
        """Logits [1, V] with penalties for the row's history; an exception is kept as ``error``."""
        if not self.processors:
            return logits
        history = torch.tensor([[*bos_ids, *self.ids]], dtype=torch.long, device=logits.device)
        try:
            return self.processors(history, logits)
        except Exception as error:
            self.error = error
            return logits

    def ends(self, eos_ids: Sequence[int]) -> bool:
        """Whether its latest token ends the row; an exception is kept as ``error``, and ends it."""
        try:
            return self.error is not None or self.ids[-1] in eos_ids or self.options.stop(self.ids)
        except Exception as error:
            self.error = error
            return True

    def logprobs(self, logits: Tensor, token_id: int) -> Logprobs | None:
        """Log probabilities under the LM's own logits [V], before penalties and temperature."""
        if self.options.top_logprobs is None:
            return None
        values = logits.log_softmax(-1)
        top = values.topk(min(self.options.top_logprobs, len(values)))
        return values[token_id].item(), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


class DecodingState:
    """Rows that are decoded together, one token per ``step``. Rows may join between steps, and leave when they end.

    The rows share one cache, in which shorter rows are padded on the left. It contains every chosen token except each
    row's last one, which the next step feeds.

    Args:
        llm: the language model.
        bos_ids: begin token, which counts as history; empty where the LM has none.
        eos_ids: tokens that end a row, beside ``options.stop``.
        record: where given, steps of rows that stay the same are recorded and replayed, without hooks of modules.
    """

    def __init__(
        self, llm: PreTrainedModel, bos_ids: Sequence[int], eos_ids: Sequence[int], record: Record | None = None
    ) -> None:
        self.llm, self.bos_ids, self.eos_ids, self._next = llm, bos_ids, eos_ids, RecordedStep(llm, record)
        self.rows: list[_Row] = []  # those that are decoded: the batch dimension of the tensors below
        self._num_rows = 0  # added so far
        self._cache: DynamicCache | None = None
        self._is_shared = False  # whether the cache has rows, or room, of others
        self._attention_mask = torch.empty(0)  # int64 [B, S] on the CPU, 0 on padding

    @torch.inference_mode()
    def add(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        options: Sequence[GenerationOptions],
        cache: DynamicCache | None = None,
        on_leave: Sequence[OnLeave | None] | None = None,
    ) -> list[Token]:
        """Prefills new rows, which join those that are being decoded; returns the first token of each.

        Args:
            inputs_embeds: the positions to prefill [B, t, L], shorter rows padded on the left.
            attention_mask: int64 [B, S + t] on the CPU, 0 on padding.
            options: one for each row; ``num_beams`` has no effect.
            cache: the S positions that were prefilled before. It is extended in place, and remains the cache of these
                rows as long as no others join or leave.
            on_leave: one for each row, called when it leaves.
        """
        cache, device, rows = new_cache() if cache is None else cache, inputs_embeds.device, []
        logits = next_token_logits(self.llm, inputs_embeds, attention_mask, cache)
        for i, row in enumerate(options):
            processors = build_processors(row, self.bos_ids, self.eos_ids, device)
            number, leave = self._num_rows + i, on_leave[i] if on_leave else None
            rows.append(_Row(number, row, processors, row.generator(device), leave))
        if self.rows:
            for own, new in zip(self._cache.layers, cache.layers, strict=True):
                own.add_rows(new)
            length = self._cache.get_seq_length()
            masks = [pad(mask, (length - mask.shape[1], 0)) for mask in (self._attention_mask, attention_mask)]
            attention_mask, cache = torch.cat(masks), self._cache
        self._cache, self._attention_mask = cache, attention_mask
        self.rows += rows
        self._num_rows += len(rows)
        self._is_shared = len(self.rows) > 1
        return self._choose(rows, logits)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Chooses one more token for each row; rows that end leave."""
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self.llm.device)
        self._attention_mask = pad(self._attention_mask, (0, 1), value=1)
        return self._choose(self.rows, self._next.logits(ids, self._attention_mask, self._cache))

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[Token]:
        """Tokens for rows by their logits float32 [B, V]; those that end leave."""
        scores = logits
        if any(row.processors for row in rows):
            scores = torch.cat([row.process(own, self.bos_ids) for row, own in zip(rows, logits.split(1), strict=True)])
        chosen = scores.argmax(-1)
        alike: dict[tuple[float, float], list[int]] = {}  # rows that are sampled, by the settings of their warpers
        for i, options in enumerate(row.options for row in rows):
            if options.do_sample:
                alike.setdefault((options.temperature, options.top_p), []).append(i)
        for indices in alike.values():
            warped = build_warpers(rows[indices[0]].options)(None, scores[indices])
            chosen[indices] = sample(warped, [rows[i].generator for i in indices])
        tokens, finished = [], []
        for row, token_id, own in zip(rows, chosen.tolist(), logits, strict=True):
            row.ids.append(token_id)
            is_end = row.ends(self.eos_ids)
            tokens.append(Token(row.number, token_id, is_end, row.logprobs(own, token_id), row.error))
            if is_end or len(row.ids) >= row.options.max_new_tokens:
                finished.append(row.number)
        self.remove(finished)
        return tokens

    @torch.inference_mode()
    def remove(self, numbers: Sequence[int]) -> None:
        """Ends rows, and drops the columns in which all that remain are padded."""
        order = list(range(len(self.rows)))
        for index in reversed([i for i, row in enumerate(self.rows) if row.number in numbers]):
            row, last = self.rows[index], len(self.rows) - 1
            if row.on_leave is not None:
                self._give_cache(index, int(self._attention_mask[order[index]].sum()))
            self.rows[index], order[index] = self.rows[last], order[last]
            del self.rows[last], order[last]
            for layer in self._cache.layers if self.rows else ():  # the last row leaves the whole cache
                layer.remove_row(index)
        if not self.rows:
            self._cache = None
            return
        mask = self._attention_mask[order]
        num_padded = int(mask.any(0).int().argmax())
        self._attention_mask = mask[:, num_padded:]
        for layer in self._cache.layers if num_padded else ():
            layer.drop_first(num_padded)

    def _give_cache(self, index: int, length: int) -> None:
        """Passes the cache of a row, its last ``length`` positions, to the row's ``on_leave``."""
        own = slice(index, index + 1), slice(self._cache.get_seq_length() - length, None)
        try:
            cache = copy_cache(self._cache, *own) if self._is_shared else self._cache
        except RuntimeError as error:  # out of memory: the next turn of this chat is prefilled again
            logging.warning("The keys and values of a chat are not kept (%s).", str(error).split("\n")[0][:200])
        else:
            self.rows[index].on_leave(cache)


def tokens_of(result: Generated, row: int, options: GenerationOptions, eos_ids: Sequence[int]) -> list[Token]:
    """What a beam search found, as the tokens of a row."""
    ids = result.ids
    is_end = bool(ids) and (ids[-1] in eos_ids or options.stop(ids))
    return [Token(row, token_id, is_end and n == len(ids)) for n, token_id in enumerate(ids, 1)]

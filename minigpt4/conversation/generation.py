"""Generation from embeddings with a key-value cache: greedy, sampled, and beam search, stopping row by row.

The rules are those of transformers 4.28, which the reference ran on: the begin token counts as the first
generated token (for min_length, the repetition penalty and the length penalty), and sampling keeps the 50 best.

Shapes: B rows, T context length, L width of the LM, V vocabulary, K beams.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from minigpt4.models.language_model import new_cache, next_token_logits

TOP_K = 50


@dataclass
class GenerationOptions:
    """How to choose tokens.

    ``seed`` makes drawing repeatable, whatever else is drawn meanwhile. ``stop`` sees a row's new ids after each token
    and says whether the row is done.
    """

    max_new_tokens: int = 300
    num_beams: int = 1
    do_sample: bool = True
    min_length: int = 1
    top_p: float = 0.9
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    seed: int | None = None
    stop: Callable[[Sequence[int]], bool] = field(default=lambda ids: False)


@dataclass
class Generated:
    """One row: the new ids (begin token left out), and for beam search all K beams, best first."""

    ids: list[int]
    beams: list[list[int]] = field(default_factory=list)
    beam_scores: list[float] = field(default_factory=list)


def next_token_scores(logits: Tensor, history: Tensor, options: GenerationOptions, bos: int, eos: int) -> Tensor:
    """Log-scores [B, V] after penalties and, when sampling, after temperature, top-k and top-p.

    Args:
        logits: float32 [B, V].
        history: new ids so far, int64 [B, n].
        options: see there.
        bos: id of the begin token, which the repetition penalty sees.
        eos: id of the end token, banned until ``min_length``.
    """
    history = torch.cat([history.new_full((len(history), 1), bos), history], 1)
    scores = logits
    if options.repetition_penalty != 1.0:
        seen = scores.gather(1, history)
        seen = torch.where(seen < 0, seen * options.repetition_penalty, seen / options.repetition_penalty)
        scores = scores.scatter(1, history, seen)
    if history.shape[1] < options.min_length:
        scores = scores.index_fill(1, torch.tensor([eos], device=scores.device), -torch.inf)
    if options.do_sample:
        scores = scores / max(options.temperature, 1e-4)  # divided by less, logits would leave the range of float32
        best = scores.topk(min(TOP_K, scores.shape[1])).values
        scores = scores.masked_fill(scores < best[:, -1:], -torch.inf)
        if options.top_p < 1.0:  # the smallest set of tokens that has this share together, and at least the best one
            rising, order = scores.sort()
            is_left_out = rising.softmax(-1).cumsum(-1) <= 1 - options.top_p
            is_left_out[:, -1] = False
            scores = scores.masked_fill(is_left_out.scatter(1, order, is_left_out), -torch.inf)
    return scores


class _Decoder:
    """The LM with its cache: feeds embeddings or ids, gives the logits of the last position."""

    def __init__(self, llm: Any, mask: Tensor, cache: DynamicCache | None) -> None:
        self.llm = llm
        self.mask = mask  # [B, T so far] on the CPU, 0 where a row is padded on the left
        self.cache = new_cache() if cache is None else cache

    def feed(self, embeds: Tensor) -> Tensor:
        """[B, t, L] -> float32 logits [B, V] of the last position."""
        return next_token_logits(self.llm, embeds, self.mask, self.cache)

    def feed_ids(self, ids: Tensor) -> Tensor:
        """The next id of each row [B] -> logits [B, V]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        return self.feed(self.llm.get_input_embeddings()(ids).unsqueeze(1))

    def reorder(self, rows: list[int]) -> None:
        """Keeps the given rows of cache and mask, in that order."""
        self.cache.batch_select_indices(torch.tensor(rows, device=self.cache.layers[0].keys.device))
        self.mask = self.mask[rows]

    def branch(self, count: int) -> "_Decoder":
        """A decoder with ``count`` copies of the only row; this one's cache stays as it is."""
        cache = copy_cache(self.cache)
        cache.batch_repeat_interleave(count)
        return _Decoder(self.llm, self.mask.repeat_interleave(count, 0), cache)


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that shares the tensors and grows apart."""
    other = new_cache()
    for index, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, index)
    return other


@torch.inference_mode()
def generate(
    llm: Any,
    embeds: Tensor,
    mask: Tensor,
    options: GenerationOptions | Sequence[GenerationOptions],
    bos: int,
    eos: int,
    cache: DynamicCache | None = None,
) -> list[Generated]:
    """Continues each row of a batch of contexts; arguments as for ``stream``, which beam search does without.

    Returns:
        A result a row; the token that ended a row is the last of its ids.
    """
    each = _for_each(options, len(embeds))
    if any(o.num_beams > 1 for o in each):
        if len(each) == 1:
            return [_beam_search(llm, embeds, mask, each[0], bos, eos, cache)]
        parts = (slice(i, i + 1) for i in range(len(each)))
        return [generate(llm, embeds[part], mask[part], each[part], bos, eos)[0] for part in parts]
    rows: list[list[int]] = [[] for _ in each]
    for row, token_id, _ in stream(llm, embeds, mask, each, bos, eos, cache):
        rows[row].append(token_id)
    return [Generated(row) for row in rows]


@torch.inference_mode()
def stream(
    llm: Any,
    embeds: Tensor,
    mask: Tensor,
    options: GenerationOptions | Sequence[GenerationOptions],
    bos: int,
    eos: int,
    cache: DynamicCache | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """Continues each row of a batch, token by token; a row that is done is computed no longer.

    Args:
        llm: the LM.
        embeds: what the LM has yet to read [B, T, L], shorter rows padded on the left.
        mask: int64 [B, cached + T] on the CPU, 0 on padding.
        options: for all rows, or a list of one for each.
        bos: id of the begin token.
        eos: id of the end token; a row ends with it or where ``options.stop`` says so.
        cache: what the LM has read already; that of a single row has also read all tokens but the last when this ends.

    Yields:
        (row, token id, whether the row ends with it other than by ``max_new_tokens``).
    """
    each = _for_each(options, len(embeds))
    generators = [None if o.seed is None else torch.Generator(embeds.device).manual_seed(o.seed % 2**63) for o in each]
    decoder = _Decoder(llm, mask, cache)
    yield from _decode(decoder, decoder.feed(embeds), each, generators, bos, eos)


def _decode(
    decoder: _Decoder,
    logits: Tensor,
    each: Sequence[GenerationOptions],
    generators: Sequence[torch.Generator | None],
    bos: int,
    eos: int,
) -> Iterator[tuple[int, int, bool]]:
    rows: list[list[int]] = [[] for _ in each]
    running = list(range(len(each)))
    while True:
        if all(_is_plain(each[i], len(rows[i])) for i in running):
            tokens = logits.argmax(-1)
        else:
            tokens = torch.stack([
                _choose(logit, rows[i], each[i], generators[i], bos, eos)
                for logit, i in zip(logits, running, strict=True)
            ])  # fmt: skip
        going = []
        for place, (i, token_id) in enumerate(zip(list(running), tokens.tolist(), strict=True)):
            rows[i].append(token_id)
            is_end = token_id == eos or each[i].stop(rows[i])
            yield i, token_id, is_end
            if not is_end and len(rows[i]) < each[i].max_new_tokens:
                going.append(place)
        if not going:
            return
        if len(going) < len(running):
            decoder.reorder(going)
            running = [running[place] for place in going]
            tokens = tokens[going]
        logits = decoder.feed_ids(tokens)


def _is_plain(options: GenerationOptions, length: int) -> bool:
    """Whether the best logit is the choice, without a look at the row."""
    return not options.do_sample and options.repetition_penalty == 1.0 and length + 1 >= options.min_length


def _choose(
    logits: Tensor, ids: list[int], options: GenerationOptions, generator: torch.Generator | None, bos: int, eos: int
) -> Tensor:
    """The next token of one row, from logits [V]."""
    history = torch.tensor([ids], dtype=torch.long, device=logits.device)
    scores = next_token_scores(logits[None], history, options, bos, eos)[0]
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0] if options.do_sample else scores.argmax()


def _for_each(options: GenerationOptions | Sequence[GenerationOptions], count: int) -> Sequence[GenerationOptions]:
    return [options] * count if isinstance(options, GenerationOptions) else options


def _beam_search(
    llm: Any, embeds: Tensor, mask: Tensor, options: GenerationOptions, bos: int, eos: int, cache: DynamicCache | None
) -> Generated:
    """Beam search for one context [1, T, L], scored by sum of log-probabilities / length ** length_penalty.

    The length counts the begin token and not the end token. A beam that ``options.stop`` ends is finished with
    its last token kept, as an end token would finish it.
    """
    num_beams, device = options.num_beams, embeds.device
    reader = _Decoder(llm, mask, cache)
    logits = reader.feed(embeds).repeat_interleave(num_beams, 0)
    decoder = reader.branch(num_beams)
    generator = None if options.seed is None else torch.Generator(device).manual_seed(options.seed % 2**63)
    beams: list[list[int]] = [[] for _ in range(num_beams)]
    sums = torch.full((num_beams,), -1e9, device=device)
    sums[0] = 0.0  # all beams start alike: only one may spread
    finished: list[tuple[float, list[int]]] = []

    def finish(total: float, ids: list[int], length: int) -> None:
        finished.append((total / length**options.length_penalty, ids))
        finished.sort(key=lambda entry: entry[0], reverse=True)
        del finished[num_beams:]

    is_done = False
    while not is_done and len(beams[0]) < options.max_new_tokens:
        log_probs = logits.log_softmax(-1)
        history = torch.tensor(beams, dtype=torch.long, device=device).reshape(num_beams, -1)
        totals = next_token_scores(log_probs, history, options, bos, eos) + sums[:, None]
        if options.do_sample:
            drawn = torch.multinomial(totals.flatten().softmax(-1), 2 * num_beams, generator=generator)
            best, order = totals.flatten()[drawn].sort(descending=True)
            candidates = drawn[order]
        else:
            best, candidates = totals.flatten().topk(2 * num_beams)
        length = 1 + len(beams[0])  # of the hypotheses so far, begin token included
        kept: list[tuple[float, int, int]] = []  # total, source beam, token
        for rank, (total, flat) in enumerate(zip(best.tolist(), candidates.tolist(), strict=True)):
            source, token_id = divmod(flat, logits.shape[1])
            if token_id == eos:
                if rank < num_beams:
                    finish(total, [*beams[source], eos], length)
            elif options.stop([*beams[source], token_id]):
                if rank < num_beams:
                    finish(total, [*beams[source], token_id], length + 1)
            else:
                kept.append((total, source, token_id))
            if len(kept) == num_beams:
                break
        if len(kept) < num_beams:  # more endings among the candidates than there are spare ones
            break
        is_done = len(finished) == num_beams and finished[-1][0] >= best[0].item() / length**options.length_penalty
        beams = [[*beams[source], token_id] for _, source, token_id in kept]
        sums = torch.tensor([total for total, _, _ in kept], device=device)
        if not is_done and len(beams[0]) < options.max_new_tokens:
            decoder.reorder([source for _, source, _ in kept])
            logits = decoder.feed_ids(torch.tensor([token_id for _, _, token_id in kept], device=device))
    if not is_done:
        for total, ids in zip(sums.tolist(), beams, strict=True):
            finish(total, ids, 1 + len(ids))
    return Generated(finished[0][1], [ids for _, ids in finished], [score for score, _ in finished])

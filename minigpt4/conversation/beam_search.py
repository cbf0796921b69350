"""Beam search and beam sampling with the rules of transformers 4.28."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from minigpt4.conversation.sampling import Generated, GenerationOptions, build_processors, build_warpers
from minigpt4.models.growing_cache import copy_cache, new_cache
from minigpt4.models.language_model import next_token_logits


def search_beams(
    llm: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    options: GenerationOptions,
    bos_ids: Sequence[int],
    eos_ids: Sequence[int],
    cache: DynamicCache | None = None,
) -> Generator[None, None, Generated]:
    """Searches for the best continuation of one context [1, t, L]; arguments as for ``DecodingState.add``.

    It yields after each token of the beams, so that others can be answered in between; call it in inference mode.
    Beams are scored by sum of log-probabilities / length ** length_penalty; the length counts the begin token and not
    the end token. A beam that ``options.stop`` ends keeps its last token, as an end token would be kept. ``cache`` is
    extended by the context only.
    """
    num_beams, device, penalty = options.num_beams, inputs_embeds.device, options.length_penalty
    processors, warpers = build_processors(options, bos_ids, eos_ids, device), build_warpers(options)
    generator, cache = options.generator(device), new_cache() if cache is None else cache
    logits = next_token_logits(llm, inputs_embeds, attention_mask, cache).repeat_interleave(num_beams, 0)
    cache, attention_mask = copy_cache(cache), attention_mask.repeat_interleave(num_beams, 0)
    cache.batch_repeat_interleave(num_beams)
    beams: list[list[int]] = [[] for _ in range(num_beams)]
    sums = torch.zeros(num_beams, device=device)
    if not options.do_sample:
        sums[1:] = -1e9  # all beams are alike at first: only one may branch out
    finished: list[tuple[float, list[int]]] = []  # score and ids, best first
    while True:
        history = torch.tensor([[*bos_ids, *ids] for ids in beams], dtype=torch.long, device=device)
        totals = warpers(history, processors(history, logits.log_softmax(-1)) + sums[:, None])
        candidates = _choose(totals, num_beams * max(2, 1 + len(eos_ids)), options.do_sample, generator)
        running: list[tuple[float, int, list[int]]] = []  # fewer than num_beams where many candidates end
        length = 1 + len(beams[0])
        for rank, (total, source, token_id) in enumerate(candidates):
            ids, is_eos = [*beams[source], token_id], token_id in eos_ids
            if is_eos or options.stop(ids):
                if rank < num_beams:
                    finished.append((total / (length + (not is_eos)) ** penalty, ids))
            elif len(running) < num_beams:
                running.append((total, source, ids))
        finished = _best(finished, num_beams)
        highest = candidates[0][0] / length**penalty
        is_done = not running or (len(finished) == num_beams and finished[-1][0] >= highest)
        if not is_done and length == options.max_new_tokens:
            finished += [(total / (1 + length) ** penalty, ids) for total, _, ids in running]
            finished, is_done = _best(finished, num_beams), True
        if is_done:
            return Generated(finished[0][1], [ids for _, ids in finished], [score for score, _ in finished])
        sums = torch.tensor([total for total, _, _ in running], device=device)
        sources, beams = torch.tensor([source for _, source, _ in running]), [ids for _, _, ids in running]
        cache.batch_select_indices(sources.to(device))
        attention_mask = pad(attention_mask[sources], (0, 1), value=1)
        yield
        embeds = llm.get_input_embeddings()(torch.tensor([ids[-1:] for ids in beams], device=device))
        logits = next_token_logits(llm, embeds, attention_mask, cache)


def _best(hypotheses: list[tuple[float, list[int]]], count: int) -> list[tuple[float, list[int]]]:
    return sorted(hypotheses, key=lambda hypothesis: hypothesis[0], reverse=True)[:count]


def _choose(
    totals: Tensor, count: int, do_sample: bool, generator: torch.Generator | None
) -> list[tuple[float, int, int]]:
    """Continuations (total, source beam, token id), best first, from running sums [K, V].

    Sampling draws without replacement by the Gumbel-top-k trick (Kool et al., 2019). The distribution is that of
    ``torch.multinomial``, which fails where fewer candidates than draws have a probability above zero in float32.
    """
    totals, size = totals.flatten(), totals.shape[1]
    keys = totals - torch.empty_like(totals).exponential_(generator=generator).log() if do_sample else totals
    chosen = keys.topk(min(count, len(keys))).indices
    best, order = totals[chosen].sort(descending=True)
    pairs = zip(best.tolist(), chosen[order].tolist(), strict=True)
    return [(total, *divmod(index, size)) for total, index in pairs if total != -torch.inf]

"""What the tests of the decoding loop share: random contexts, answers by the loop alone and by transformers."""

import torch

from minigpt4.conversation.beam_search import search_beams
from minigpt4.conversation.generation import DecodingState, Generated, GenerationOptions

BOS, EOS, NO_EOS = [1], [2], [599]
LENGTHS = (5, 9, 7)


def contexts(llm, lengths=LENGTHS, seed=1):
    """Embeddings [B, T, L], shorter rows padded on the left, and their mask."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    embeds = 0.5 * torch.randn(len(lengths), width, llm.config.hidden_size, generator=generator)
    return embeds.to(llm.device), torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])


def context(llm, length, seed):
    return contexts(llm, (length,), seed)


def greedy(count, **changes):
    return GenerationOptions(do_sample=False, max_new_tokens=count, **changes)


def stream(llm, embeds, mask, options, bos, eos, cache=None):
    """The tokens of rows that are decoded together, as they are chosen; ``options`` of all rows, or of each."""
    state = DecodingState(llm, bos, eos)
    tokens = state.add(embeds, mask, _each(options, embeds), cache)
    while tokens:
        for token in tokens:
            if token.error is not None:
                raise token.error
            yield token
        tokens = state.step() if state.rows else []


def generate(llm, embeds, mask, options, bos, eos):
    """What each row becomes; with beams, each is searched alone."""
    each = _each(options, embeds)
    if any(own.num_beams > 1 for own in each):
        rows = zip(embeds.split(1), mask.split(1), each, strict=True)
        return [_search(llm, *row, bos, eos) for row in rows]
    results = [Generated([]) for _ in each]
    for token in stream(llm, embeds, mask, each, bos, eos):
        results[token.row].ids.append(token.id)
    return results


@torch.inference_mode()
def _search(*arguments):
    steps = search_beams(*arguments)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _each(options, embeds):
    return [options] * len(embeds) if isinstance(options, GenerationOptions) else options


def by_transformers(llm, embeds, mask, count, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": EOS} | settings
    output = llm.generate(inputs_embeds=embeds, attention_mask=mask.to(embeds.device), max_new_tokens=count, **settings)
    rows = [row.tolist() for row in output]
    return [row[: row.index(EOS[0]) + 1] if EOS[0] in row else row for row in rows]

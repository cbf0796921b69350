"""What the tests of the decoding loop share: random contexts, and answers by transformers."""

import torch

from minigpt4.conversation.generation import GenerationOptions

BOS, EOS, NO_EOS = [1], [2], [599]
LENGTHS = (5, 9, 7)


def contexts(llm, lengths=LENGTHS, seed=1):
    """Embeddings [B, T, L], shorter rows padded on the left, and their mask."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    embeds = 0.5 * torch.randn(len(lengths), width, llm.config.hidden_size, generator=generator)
    return embeds, torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])


def context(llm, length, seed):
    return contexts(llm, (length,), seed)


def greedy(count, **changes):
    return GenerationOptions(do_sample=False, max_new_tokens=count, **changes)


def by_transformers(llm, embeds, mask, count, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": EOS} | settings
    output = llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=count, **settings)
    rows = [row.tolist() for row in output]
    return [row[: row.index(EOS[0]) + 1] if EOS[0] in row else row for row in rows]

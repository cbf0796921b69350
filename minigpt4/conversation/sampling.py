"""How tokens are chosen: the options of an answer and transformers' logits processors that implement them.

The rules are those of transformers 4.28, which the reference ran on: the begin token counts as the first generated
token (for the minimum length, the repetition penalty and the length penalty), and sampling considers the 50 most
probable tokens. Language models without a begin token start with an empty history.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TOP_K = 50
# Of GenerationOptions, those that transformers' generate does not have under the same name.
OWN_OPTIONS = ("seed", "presence_penalty", "frequency_penalty", "top_logprobs", "logits_processors", "stop")
_MIN_TEMPERATURE = 1e-4  # logits divided by less would overflow float32


@dataclass
class GenerationOptions:
    """How the tokens of one row are chosen. At temperature 0 nothing is sampled.

    ``seed`` makes sampling repeatable whatever else draws random numbers. ``stop`` is called with a row's new token ids
    after each token and returns whether the row ends there. ``top_logprobs`` asks for log probabilities: of the chosen
    tokens and of so many most probable ones. ``logits_processors`` are called with the history [1, n] of begin and new
    tokens and the scores [1, V] before temperature, top-k and top-p. ``repetition_penalty`` None is that of ``Chat``.
    """

    max_new_tokens: int = 300
    num_beams: int = 1
    do_sample: bool = True
    min_length: int = 1
    top_p: float = 0.9
    temperature: float = 1.0
    repetition_penalty: float | None = None
    length_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    stop: Callable[[Sequence[int]], bool] = field(default=lambda ids: False)

    def __post_init__(self) -> None:
        self.do_sample = self.do_sample and self.temperature > 0

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The random number generator of ``seed`` on a device; None: torch's global one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed % 2**63)


class _CountPenalty(LogitsProcessor):
    """OpenAI's penalties: each new token costs ``presence`` once and ``frequency`` each time it occurred."""

    def __init__(self, presence: float, frequency: float, num_begin: int) -> None:
        self.presence, self.frequency, self.num_begin = presence, frequency, num_begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids [B, n] with ``num_begin`` begin tokens, and scores [B, V], to scores [B, V]."""
        new_ids = input_ids[:, self.num_begin :]
        counts = torch.zeros_like(scores).scatter_add_(1, new_ids, torch.ones_like(new_ids, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


def remaining(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [B, n] of [B, V] that are left, highest first, with their indices; -inf in rows that keep fewer."""
    return scores.topk(int((scores > -torch.inf).sum(-1).max()))


def sample(scores: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """Draws an index of each row of scores [B, V] by the generator of the row; int64 [B].

    One number per row is drawn and looked up in the distribution, so that a row's draws do not depend on other rows.
    """
    values, indices = remaining(scores)
    probabilities = values.softmax(-1)
    drawn = torch.cat([torch.rand(1, generator=each, device=scores.device) for each in generators])
    sums = probabilities.cumsum(-1)
    chosen = (sums <= drawn[:, None] * sums[:, -1:]).sum(-1).minimum((probabilities > 0).sum(-1) - 1)
    return indices.gather(1, chosen[:, None])[:, 0]


class _TopP(LogitsProcessor):
    """transformers' top-p for scores of which few are left: those are sorted, and not the whole vocabulary."""

    def __init__(self, top_p: float, num_kept: int) -> None:
        self.warper = TopPLogitsWarper(top_p, min_tokens_to_keep=num_kept)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] to scores [B, V]; -inf removes a token."""
        values, indices = remaining(scores)
        kept = self.warper(input_ids, values.flip(-1)).flip(-1)  # of equal scores it keeps the last one
        return torch.full_like(scores, -torch.inf).scatter_(-1, indices, kept)


@dataclass
class Generated:
    """The new token ids of one row, without the begin token; with beam search also all beams, best first."""

    ids: list[int]
    beams: list[list[int]] = field(default_factory=list)
    beam_scores: list[float] = field(default_factory=list)


def build_processors(
    options: GenerationOptions, bos_ids: Sequence[int], eos_ids: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """Penalties on scores [B, V] given the history [B, n] of begin and new tokens; empty where there are none."""
    processors = LogitsProcessorList()
    if options.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.presence_penalty or options.frequency_penalty:
        processors.append(_CountPenalty(options.presence_penalty, options.frequency_penalty, len(bos_ids)))
    if options.min_length > len(bos_ids):
        processors.append(MinLengthLogitsProcessor(options.min_length, list(eos_ids), device=device))
    processors.extend(options.logits_processors)
    return processors


def build_warpers(options: GenerationOptions) -> LogitsProcessorList:
    """Temperature, top-k and top-p; empty where nothing is sampled. Every beam keeps two tokens at least."""
    if not options.do_sample:
        return LogitsProcessorList()
    num_kept = 2 if options.num_beams > 1 else 1
    warpers = LogitsProcessorList([
        TemperatureLogitsWarper(max(float(options.temperature), _MIN_TEMPERATURE)),
        TopKLogitsWarper(TOP_K, min_tokens_to_keep=num_kept),
    ])  # fmt: skip
    if options.top_p < 1.0:
        warpers.append(_TopP(options.top_p, num_kept))
    return warpers

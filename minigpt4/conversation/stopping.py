"""Where answers end: stopping criteria for transformers' ``generate``, and the stable part of a growing text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StoppingCriteriaSub:
    """Stops rows that end with one of several id sequences; a stopping criterion for transformers' ``generate``."""

    stops: Sequence[Tensor] = field(default_factory=list)
    encounters: int = 1

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **_: Any) -> Tensor:
        """Ids [B, T] to bool [B]."""
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            tail = input_ids[:, -len(stop) :]
            if tail.shape[1] == len(stop):
                ended |= (tail == stop.to(input_ids.device)).all(1)
        return ended


def hold_back_partial_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The part of a growing answer that is final: without an incomplete character or the start of a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip()

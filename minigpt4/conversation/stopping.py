"""Where answers end: stopping criteria for transformers' ``generate``, and the final part of a growing text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StoppingCriteriaSub(StoppingCriteria):
    """Stops rows that end with one of several id sequences; ``encounters`` has no effect, as in the reference."""

    def __init__(self, stops: Sequence[Tensor] = (), encounters: int = 1) -> None:
        super().__init__()
        self.stops = stops

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Ids [B, T] to bool [B]."""
        is_done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            tail = input_ids[:, -len(stop) :]
            if tail.shape[1] == len(stop):
                is_done |= (tail == stop.to(input_ids.device)).all(1)
        return is_done


class StopStringCriteria(StoppingCriteria):
    """Stops rows whose latest tokens contain a text, which has other ids alone, after a word and after punctuation."""

    def __init__(self, tokenizer: Any, stop_string: str) -> None:
        super().__init__()
        self.tokenizer, self.stop_string = tokenizer, stop_string

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether one row ends here; an empty text ends nothing."""
        return bool(self.stop_string) and self.stop_string in self.tokenizer.decode(ids[-len(self.stop_string) - 1 :])

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Ids [B, T] to bool [B]."""
        return torch.tensor([self.ends(row) for row in input_ids.tolist()], device=input_ids.device)


def hold_back_partial_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The part of a growing answer that is final: without an incomplete character or the start of a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip()

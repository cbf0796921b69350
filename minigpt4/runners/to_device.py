"""Batches on their way to the device."""

from typing import Any

import torch

from minigpt4.common import device as devices
from minigpt4.processors.pictures import Pictures


class ToDevice:
    """Puts the tensors and pictures of batches on a device while it still computes the step before.

    The host hands out a step long before it is computed, and the next batch's copy right behind it. On a stream of its
    own that copy begins when the step before last is done, whose memory it may then take: two batches are there at a
    time, however far ahead the host is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = devices.streams(device)
        self._own = self._streams and self._streams.Stream(device)
        self._queued: Any = None  # an event behind what was handed out when the batch before this one came
        self._last: list[dict[str, Any]] = []  # two batches, each held until the stream has waited for its step

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with its tensors and pictures on the device; to be used up before the next one is asked for."""
        if self._own is None:
            return self._move(batch)
        present = self._streams.current_stream(self.device)
        if self._queued is not None:
            self._own.wait_event(self._queued)
        self._queued = present.record_event()
        del self._last[:-1]
        with self._streams.stream(self._own):
            self._last.append(self._move(batch))
        present.wait_stream(self._own)
        return self._last[-1]

    def _move(self, batch: dict[str, Any]) -> dict[str, Any]:
        def move(value: Any) -> Any:
            if isinstance(value, Pictures):
                return value.on(self.device)
            return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return {name: move(value) for name, value in batch.items()}

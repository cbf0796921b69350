"""Pictures as bytes on their way to the device, and what becomes of them there: the model's pixels.

A loader worker decodes, cuts and packs; bytes are a quarter of what floats would be. The device normalises, and where
it is good at that it resizes too, by Pillow's own integer arithmetic. Wherever that is done, the numbers are the same.

Shapes: B batch, h and w of a picture, S image side, K taps of a filter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

_SUPPORT = 2.0  # of the bicubic filter, in pixels of the coarser side
_PRECISION_BITS = 22  # of Pillow's filter coefficients


@dataclass
class Pictures:
    """A batch of RGB pictures, one behind the other: cut from their originals and perhaps still to be resized.

    Args:
        data: uint8 [sum of 3 * h * w], the three planes of each picture.
        sizes: (h, w) each.
        side: S, that the model takes.
        mean, std: of each channel, from 0 to 1.
    """

    data: Tensor
    sizes: list[tuple[int, int]]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def pack(
        cls, images: Sequence[Image.Image], side: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Pictures":
        """From RGB images, in a loader worker into the memory that it shares with the training process."""
        sizes = [(image.height, image.width) for image in images]
        data = _empty(sum(3 * height * width for height, width in sizes))
        flat, start = data.numpy(), 0
        for plane in (plane for image in images for plane in image.split()):
            pixels = numpy.frombuffer(plane.tobytes(), numpy.uint8)
            flat[start : start + len(pixels)] = pixels
            start += len(pixels)
        return cls(data, sizes, side, mean, std)

    def __len__(self) -> int:
        return len(self.sizes)

    def pin_memory(self) -> "Pictures":
        """In page-locked memory; the loader calls it where copies to the device are faster so."""
        return replace(self, data=self.data.pin_memory())

    def on(self, device: torch.device | str) -> Tensor:
        """The model's pixels on a device: float32 [B, 3, S, S], normalised, equal to the processors' own bit for bit.

        One copy of the bytes goes to the device.
        """
        data = self.data.to(device, non_blocking=True)
        if all(size == (self.side, self.side) for size in self.sizes):
            pixels = data.view(len(self), 3, self.side, self.side)
        else:
            pixels = _resize(data, self.sizes, self.side)
        mean, std = torch.tensor([self.mean, self.std]).to(device, non_blocking=True)[..., None, None]
        # The divisor stands on the device: some kinds take the reciprocal of a plain number, which rounds differently.
        return pixels.float().div_(torch.full((), 255.0, device=device)).sub_(mean).div_(std)


def _empty(num_bytes: int) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    # What torch's own collate does: sent from elsewhere, it would be copied into shared memory first.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes, device="cpu"))


def resizes_alike(height: int, width: int, side: int) -> bool:
    """Whether a picture may be left to ``Pictures.on``: within twice and half the side, so that it is small as well."""
    return side <= 2 * min(height, width) and max(height, width) <= 2 * side


def _resize(data: Tensor, sizes: list[tuple[int, int]], side: int) -> Tensor:
    """Pictures, one behind the other, to uint8 [B, 3, S, S], resized as by Pillow: along rows, then columns."""
    heights, widths = zip(*sizes, strict=True)
    pixels = data.new_empty(len(sizes), 3, max(heights), max(widths))
    parts = data.split([3 * height * width for height, width in sizes])
    for i, (part, (height, width)) in enumerate(zip(parts, sizes, strict=True)):
        pixels[i, :, :height, :width] = part.view(3, height, width)
    return _resize_along(2, _resize_along(3, pixels, widths, side), heights, side)


def _resize_along(dim: int, pixels: Tensor, sizes: Sequence[int], side: int) -> Tensor:
    starts, weights, num_taps = zip(*(_filter(size, side) for size in sizes), strict=True)
    shape, spread = list(pixels.shape), [len(sizes), 1, 1, 1]
    shape[dim] = spread[dim] = side
    first = torch.stack(starts).to(pixels.device, non_blocking=True)  # [B, S]
    taps = torch.stack(weights).to(pixels.device, non_blocking=True)  # [B, K, S]
    total = torch.full(shape, 1 << (_PRECISION_BITS - 1), dtype=torch.int32, device=pixels.device)
    for k in range(max(num_taps)):
        index = (first + k).clamp(max=pixels.shape[dim] - 1).view(spread).expand(shape)
        total += pixels.gather(dim, index).int() * taps[:, k].view(spread)
    return (total >> _PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=4096)
def _filter(size: int, side: int) -> tuple[Tensor, Tensor, int]:
    """Pillow's bicubic filter from ``size`` to ``side``: first taps, int64 [S], weights, int32 [K, S], taps used.

    The doubles are computed and rounded in the order of Pillow's Resample.c (precompute_coeffs).
    """
    scale = size / side
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    center = (numpy.arange(side) + 0.5) * scale
    first = numpy.maximum((center - support + 0.5).astype(numpy.int64), 0)
    last = numpy.minimum((center + support + 0.5).astype(numpy.int64), size)
    tap = numpy.arange(2 * ceil(2 * _SUPPORT) + 1)[:, None]  # as many as the largest scale, 2, can need
    distance = numpy.abs((tap + first - center + 0.5) * (1.0 / filter_scale))
    near = ((-0.5 + 2.0) * distance - (-0.5 + 3.0)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    weight = numpy.where(distance < 1.0, near, numpy.where(distance < 2.0, far, 0.0)) * (tap < last - first)
    weight = weight / numpy.cumsum(weight, axis=0)[-1]  # cumsum adds in order, sum does not
    scaled = weight * (1 << _PRECISION_BITS)
    rounded = (scaled + numpy.copysign(0.5, scaled)).astype(numpy.int32)
    return torch.from_numpy(first), torch.from_numpy(rounded), int((last - first).max())

"""Pictures as bytes on their way to the device, and what becomes of them there: the model's pixels.

A loader worker decodes, cuts and packs; bytes are a quarter of what floats would be. The device normalises, and an
accelerator resizes too, by products of matrices that are Pillow's own integer arithmetic. Wherever that is done, the
numbers are the same.

Shapes: B batch, h and w of a picture, S image side, K taps of a filter.
"""

import logging
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
_AT_ONCE = 16  # pictures that are resized together: a whole batch of 64 would take 240 to 440 MB
_UNIT = float(1 << 12)  # of the upper half of a coefficient


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


def device_resizes(wanted: bool | None, device: torch.device) -> bool:
    """Whether crops go to a device in their own sizes: as wanted, else to accelerators, if they resize as Pillow does.

    That is tried with two pictures, as not every kind computes products of float32 as such.
    """
    if not (device.type != "cpu" if wanted is None else wanted):
        return False
    draw, black_and_white = numpy.random.default_rng(0), numpy.array([0, 255], numpy.uint8)
    late = [Image.fromarray(draw.choice(black_and_white, (h, w, 3))) for h, w in ((229, 251), (130, 400))]
    early = [picture.resize((224, 224), Image.Resampling.BICUBIC) for picture in late]
    try:
        found = [Pictures.pack(images, 224, (0.0,) * 3, (1.0,) * 3).on(device) for images in (early, late)]
        if torch.equal(*found):
            return True
        problem = "gives other pixels than Pillow"
    except RuntimeError as error:
        problem = f"fails ({error})"
    logging.warning("Resizing on %s %s; the loader's workers resize.", device.type, problem)
    return False


def _resize(data: Tensor, sizes: list[tuple[int, int]], side: int) -> Tensor:
    """Pictures, one behind the other, to whole numbers [B, 3, S, S], float32."""
    parts = data.split([3 * height * width for height, width in sizes])
    starts = range(0, len(sizes), _AT_ONCE)
    return torch.cat([_resized(parts[i : i + _AT_ONCE], sizes[i : i + _AT_ONCE], side) for i in starts])


def _resized(parts: Sequence[Tensor], sizes: Sequence[tuple[int, int]], side: int) -> Tensor:
    """As Pillow does: along rows, then columns."""
    (heights, widths), device = zip(*sizes, strict=True), parts[0].device
    pixels = torch.zeros(len(sizes), max(heights), 3, max(widths), device=device)
    for picture, part, (height, width) in zip(pixels, parts, sizes, strict=True):
        picture[:height, :, :width] = part.view(3, height, width).transpose(0, 1)
    with torch.autocast(device.type, enabled=False):
        by_rows = (pixels.flatten(1, 2) @ part.mT for part in _filters(widths, side, device))
        columns = _shifted(*by_rows).unflatten(1, (-1, 3)).flatten(2)  # [B, h, 3 * S]
        by_columns = (part @ columns for part in _filters(heights, side, device))
        return _shifted(*by_columns).unflatten(2, (3, side)).transpose(1, 2)


def _filters(sizes: Sequence[int], side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Upper and lower halves of Pillow's integer filters as matrices, float32 [B, S, largest size].

    Both halves of a coefficient are at most 2^11, and sums of its products with bytes stay under 2^24: products of
    these matrices are exact, in float32 and in TF32 and added in any order.
    """
    places, weights = map(torch.stack, zip(*(_taps(size, side, device) for size in sizes), strict=True))
    matrices = torch.zeros(len(sizes), side, max(sizes) + weights.shape[-1], device=device)
    matrices = matrices.scatter_(2, places, weights)[..., : max(sizes)]
    upper = (matrices / _UNIT).round()
    return upper, matrices - upper * _UNIT


def _shifted(upper: Tensor, lower: Tensor) -> Tensor:
    """Sums of both halves to bytes, as float32: what Pillow's shift leaves of the whole, half a step added before."""
    step = (1 << _PRECISION_BITS) / _UNIT
    return (((lower / _UNIT).floor_() + upper + step / 2) / step).floor_().clamp_(0, 255)


@lru_cache(maxsize=4096)
def _taps(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pillow's bicubic filter from ``size`` to ``side``: places, int64 [S, K], and whole weights, float32 [S, K].

    They stay on the device: the host would wait for them, copied with each batch from memory that is not page-locked,
    as it does when a size comes for the first time. The doubles are computed and rounded in the order of Pillow's
    Resample.c (precompute_coeffs).
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
    return torch.from_numpy((tap + first).T).to(device), torch.from_numpy(rounded.T.astype(numpy.float32)).to(device)

"""An emulated Ascend NPU: the device ``npu``, ``torch.npu`` and the process-group backend ``hccl``, all on the CPU.

It takes the place of torch_npu in tests: PyTorch finds ``autoload`` as an entry point of the group
``torch.backends`` and calls it at the end of ``import torch``. This module then is ``torch.npu``. Results are those
of the CPU kernels; see ``emulated_npu.cpp`` for what is imitated and what is not.

Environment:
    EMULATED_NPU_COUNT: how many devices the machine has, 2 where not set.
    ASCEND_RT_VISIBLE_DEVICES: which of them this process sees, as "0" or "0,1".
"""

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import _emulated_npu
import torch

Index = int | str | torch.device | None

Stream, Event = torch.Stream, torch.Event
config = SimpleNamespace(allow_internal_format=True)  # written by programs, read by nothing here
compile_modes: list[dict[str, Any]] = []  # what set_compile_mode was called with, for tests to read
_forked = False


def autoload() -> None:
    """Makes the emulated device part of PyTorch, once per process."""
    if hasattr(torch, "npu"):
        return
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", sys.modules[__name__])
    torch.utils.generate_methods_for_privateuse1_backend()
    if torch.distributed.is_available():
        torch.distributed.Backend.register_backend("hccl", _make_hccl, devices=["npu"])
    os.register_at_fork(after_in_child=_note_fork)
    atexit.register(_let_threads_finish)


def _let_threads_finish() -> None:
    """Waits for what backward passes and gloo left behind.

    Their threads drop Python objects (the context that each backward pass stashes, see torch.autograd.graph) a moment
    after the result is there. Up to Python 3.13, one that needs the interpreter while it shuts down aborts the process.
    """
    time.sleep(0.1)


def _note_fork() -> None:
    global _forked
    _forked = True


def _make_hccl(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return _emulated_npu.emulated_hccl(torch.distributed.ProcessGroupGloo(store, rank, size, timeout=timeout))


def _index(device: Index = None) -> int:
    """The number of a device given in any of the usual ways; None is the current one."""
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        if device.type != "npu":
            raise ValueError(f"Expected an npu device, not {device}.")
        device = device.index
    return current_device() if device is None or device < 0 else device


# Devices


def is_available() -> bool:
    """Whether there is an emulated device."""
    return device_count() > 0


def device_count() -> int:
    """How many emulated devices this process sees."""
    return _emulated_npu.device_count()


def current_device() -> int:
    """The number of this thread's device."""
    return _emulated_npu.current_device()


def set_device(device: Index) -> None:
    """Makes a device this thread's."""
    _emulated_npu.exchange_device(_index(device))


class device:
    """Makes a device this thread's for a block."""

    def __init__(self, device: Index) -> None:
        self.index = _index(device)

    def __enter__(self) -> "device":
        self._before = _emulated_npu.exchange_device(self.index)
        return self

    def __exit__(self, *_: object) -> None:
        _emulated_npu.exchange_device(self._before)


def get_device_name(device: Index = None) -> str:
    """A name that no real device has."""
    return f"Emulated NPU {_index(device)}"


def get_device_properties(device: Index = None) -> SimpleNamespace:
    """Name and memory of a device."""
    return SimpleNamespace(name=get_device_name(device), total_memory=mem_get_info(device)[1])


def is_initialized() -> bool:
    """Always: there is nothing to initialise."""
    return True


def init() -> None:
    """Nothing to do."""


def _is_in_bad_fork() -> bool:
    """Whether this is a forked child, where a real device could not be used."""
    return _forked


# Streams: work is done when a call returns, so they order nothing.


def synchronize(device: Index = None) -> None:
    """Nothing to wait for."""
    _index(device)


def current_stream(device: Index = None) -> torch.Stream:
    """The current stream of a device."""
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: Index = None) -> torch.Stream:
    """The first stream of a device."""
    current = current_stream(device)
    return torch.Stream(stream_id=0, device_index=current.device_index, device_type=current.device_type)


def set_stream(stream: torch.Stream) -> None:
    """Makes a stream current."""
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Makes a stream current for a block."""
    with contextlib.nullcontext() if stream is None else stream:
        yield


# Random state


def _generator(device: Index = None) -> torch.Generator:
    return _emulated_npu.default_generator(_index(device))


def get_rng_state(device: Index = "npu") -> torch.Tensor:
    """The random state of a device, a CPU tensor."""
    return _generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: Index = "npu") -> None:
    """Puts a random state back."""
    _generator(device).set_state(new_state)


def manual_seed(seed: int) -> None:
    """Seeds the current device."""
    _generator().manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seeds all devices."""
    for index in range(device_count()):
        _generator(index).manual_seed(seed)


def initial_seed() -> int:
    """What the current device was seeded with."""
    return _generator().initial_seed()


# Precision


def is_bf16_supported() -> bool:
    """As on the Ascend devices of today."""
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What autocast may compute in."""
    return [torch.float16, torch.bfloat16]


def set_compile_mode(jit_compile: bool = False, **options: Any) -> None:
    """Notes the call in ``compile_modes``; operators here are never compiled."""
    compile_modes.append({"jit_compile": jit_compile, **options})


# Memory, counted in bytes of living tensors


def memory_allocated(device: Index = None) -> int:
    """Bytes of tensors on a device now."""
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Index = None) -> int:
    """The most bytes of tensors that were on a device at once."""
    return torch.accelerator.max_memory_allocated(_index(device))


def reset_peak_memory_stats(device: Index = None) -> None:
    """Starts the peak anew."""
    torch.accelerator.reset_peak_memory_stats(_index(device))


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def mem_get_info(device: Index = None) -> tuple[int, int]:
    """Free and total bytes of a device, of which the total is made up and no limit."""
    return torch.accelerator.get_memory_info(_index(device))


def empty_cache() -> None:
    """Nothing is cached."""

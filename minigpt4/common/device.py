"""The only room that knows devices by name. Everybody else holds a ``torch.device`` and asks here.

Order of preference where nothing is asked for: Ascend NPU, CUDA, Apple MPS, CPU. torch_npu, once installed,
loads itself when torch is imported; nothing here imports it.
"""

import contextlib
import functools
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from minigpt4.common.errors import UserError

_BACKENDS = {"npu": "hccl", "cuda": "nccl"}
_PREFERENCE = ("npu", "cuda", "mps")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _module(kind: str) -> Any:
    return getattr(torch, kind, None)


@functools.cache
def _tell_once(message: str) -> None:
    logging.info(message)


def is_available(kind: str) -> bool:
    """Whether this process can use devices of that kind."""
    module = _module(kind)
    return kind == "cpu" or (module is not None and hasattr(module, "is_available") and module.is_available())


def pick(wanted: str = "auto", index: int | None = None) -> torch.device:
    """Chooses this process's device: the wanted kind where it is there, else the best that is, said in the log.

    Args:
        wanted: auto, npu, cuda, mps or cpu. The reference's YAML files all say cuda.
        index: which of several; under torchrun the local rank.

    Raises:
        UserError: the name is none of these.
    """
    kind, _, number = str(wanted or "auto").partition(":")
    if kind not in ("auto", "cpu", *_PREFERENCE):
        raise UserError(f"run.device is '{wanted}'; expected auto, npu, cuda, mps or cpu.")
    found = next((k for k in _PREFERENCE if is_available(k)), "cpu")
    if kind not in ("auto", found) and not is_available(kind):
        _tell_once(f"run.device asks for {kind}, which is not available here: using {found}.")
    elif kind != "auto":
        found = kind
    if found in ("cpu", "mps"):
        return torch.device(found)
    device = torch.device(found, int(number) if number else index or 0)
    count = _module(found).device_count()
    if device.index >= count:
        raise UserError(f"Device {device} was asked for, but {count} of that kind are visible; start fewer processes.")
    _module(found).set_device(device)
    if found == "npu":
        _module(found).set_compile_mode(jit_compile=False)  # operators compiled ahead, as shapes change every batch
    return device


def of_run(cfg: Any) -> torch.device:
    """This process's device under a configuration's ``run`` section (which may be missing)."""
    return pick((cfg or {}).get("device", "auto"), local_rank())


def backend(device: torch.device) -> str:
    """The process-group backend of a device."""
    return _BACKENDS.get(device.type, "gloo")


def half_dtype(device: torch.device) -> torch.dtype:
    """The precision that frozen weights and autocast use by default: bf16, else fp16; float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    module = _module(device.type)
    has_bf16 = getattr(module, "is_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bf16 else torch.float16


def has_int8(device: torch.device) -> bool:
    """Whether 8-bit weights are known to work there."""
    return device.type in ("cpu", "cuda")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision in ``dtype``; none at all in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler | None:
    """A dynamic loss scaler where gradients are fp16, else None."""
    return torch.amp.GradScaler(device.type) if dtype == torch.float16 else None


def max_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of the device, or on a CPU of the process."""
    if device.type == "cpu":
        import resource  # Unix only

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measure = getattr(_module(device.type), "max_memory_allocated", lambda _: 0)
    return measure(device) / 2**20


def memory_mib(device: torch.device) -> float:
    """Memory in use now, in MiB: of the device, or on a CPU of the process (Linux)."""
    if device.type == "cpu":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return getattr(_module(device.type), "memory_allocated", lambda _: 0)(device) / 2**20


def synchronize(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type != "cpu":
        _module(device.type).synchronize()


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The random state of this process, of tensors and plain values only, so that it can be saved with weights."""
    kind, keys, *rest = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, [int(k) for k in keys], *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type not in ("cpu", "mps"):
        state["device"] = _module(device.type).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts a state of ``random_state`` back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "device" in state and device.type not in ("cpu", "mps"):
        _module(device.type).set_rng_state(state["device"].cpu(), device)


@contextlib.contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seeds Python's and torch's CPU generators for a block, and puts their states back after it."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)


def local_rank() -> int:
    """This process's place on its machine, 0 where torchrun did not start it."""
    return int(os.environ.get("LOCAL_RANK", 0))

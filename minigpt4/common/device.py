"""The only room that knows devices by name. Everybody else holds a ``torch.device`` and asks here.

Built on ``torch.accelerator``, which knows one kind of accelerator a process: NPU before CUDA before MPS where several
could be. torch_npu, once installed, loads itself when torch is imported; nothing here imports it.
"""

import contextlib
import functools
import logging
import os
import platform
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

from minigpt4.common.errors import UserError, see
from minigpt4.common.torch_setup import npu_mismatch, package_version

_BACKENDS = {"npu": "hccl", "cuda": "nccl"}
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_KINDS = ("auto", "cuda", "npu", "mps", "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


@functools.cache
def _tell_once(message: str) -> None:
    logging.info(message)


def best() -> str:
    """The kind of device that this process can use best: its accelerator, else cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def pick(wanted: str = "auto", index: int | None = None, is_strict: bool = False) -> torch.device:
    """Chooses this process's device: the wanted kind where it is there, else the best that is, said in the log.

    Args:
        wanted: auto, npu, cuda, mps or cpu. The reference's YAML files all say cuda.
        index: which of several; under torchrun the local rank.
        is_strict: a kind that is absent is a mistake.

    Raises:
        UserError: the name is none of these, there are fewer devices than ``index`` asks for, or a strict wish fails.
    """
    kind, _, number = str(wanted or "auto").partition(":")
    if kind not in _KINDS or (number and not number.isdecimal()):
        raise UserError(f"run.device is '{wanted}'; expected {', '.join(_KINDS[:-1])} or cpu, perhaps as cuda:1.")
    found = best()
    if kind not in ("auto", "cpu", found):
        why = _why_absent(kind)
        if is_strict:
            raise UserError(f"run.device is {wanted} and run.strict_device is set, but {why}")
        _tell_once(f"run.device asks for {kind}, which is not available here ({why}) Using {found}.")
    elif kind == "cpu":
        found = "cpu"
    if found in ("cpu", "mps"):
        return torch.device(found)
    device = torch.device(found, int(number) if number else index or 0)
    count = torch.accelerator.device_count()
    if device.index >= count:
        variable = _VISIBLE.get(found, "the visible devices")
        raise UserError(
            f"Device {device} was asked for, but {count} of that kind are visible "
            f"({variable} is {os.environ.get(variable, 'not set')}); start fewer processes a machine "
            "(torchrun --nproc-per-node) or make more devices visible."
        )
    if found == "npu":
        _set_up_npu(device)
    use(device)
    return device


def _why_absent(kind: str) -> str:
    if kind == "npu" and package_version("torch_npu") is None:
        return "torch_npu is not installed: pip install -r requirements-npu.txt."
    if kind == "cuda" and not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA: install the CUDA build of the same version."
    variable = _VISIBLE.get(kind)
    if variable is None:
        return f"torch {torch.__version__} sees no {kind} device."
    seen = f"{variable} is {os.environ.get(variable, 'not set')}"
    return f"no {kind} device is seen ({seen}): check the driver with {'npu' if kind == 'npu' else 'nvidia'}-smi."


def _set_up_npu(device: torch.device) -> None:
    if mismatch := npu_mismatch():
        raise UserError(mismatch)
    module = _module(device)
    module.set_compile_mode(jit_compile=False)  # ready-made operators: shapes change with every batch
    module.config.allow_internal_format = False  # weights stay in the layout that checkpoints have
    # Captions differ in length from batch to batch; segments that can grow keep the memory from being cut up.
    os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")


def use(device: torch.device) -> None:
    """Makes a device the present thread's own; threads that serve requests each have to."""
    if device.index is not None and device.type not in ("cpu", "mps"):
        torch.accelerator.set_device_index(device.index)


def of_run(cfg: Any) -> torch.device:
    """This process's device under a configuration's ``run`` section (which may be missing)."""
    cfg = cfg or {}
    return pick(cfg.get("device", "auto"), local_rank(), bool(cfg.get("strict_device", False)))


def backend(device: torch.device) -> str:
    """The process-group backends of a device: its own, and gloo for what stays on the host."""
    return f"cpu:gloo,{device.type}:{_BACKENDS[device.type]}" if device.type in _BACKENDS else "gloo"


def is_from_backend(error: Exception) -> bool:
    """Whether an exception comes from the library that carries messages between processes."""
    names = ("gloo", "ProcessGroup", *(name.upper() for name in _BACKENDS.values()))
    return any(name in str(error) for name in names)


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision that frozen weights and autocast use by default: bf16, else fp16; float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    has_bf16 = getattr(_module(device), "is_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bf16 else torch.float16


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether torch's fused AdamW, which can leave out an update without asking the host, is known to work there."""
    return device.type in ("cpu", "cuda")


def has_int8(device: torch.device) -> bool:
    """Whether 8-bit weights are known to work there."""
    return device.type in ("cpu", "cuda")


def compiles(device: torch.device) -> bool:
    """Whether ``run.compile`` is for it: PyTorch itself writes kernels for CUDA; on a CPU they gained nothing."""
    return device.type == "cuda"


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
    measure = getattr(_module(device), "max_memory_allocated", lambda _: 0)
    return measure(device) / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Lets ``max_memory_mib`` count from now on; a CPU's peak is the process's and stays."""
    getattr(_module(device), "reset_peak_memory_stats", lambda _: None)(device)


def memory_mib(device: torch.device) -> float:
    """Memory in use now, in MiB: of the device, or on a CPU of the process (Linux)."""
    if device.type == "cpu":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return getattr(_module(device), "memory_allocated", lambda _: 0)(device) / 2**20


def describe(device: torch.device) -> tuple[str, int]:
    """The name of a device's hardware, and the bytes of memory that it has."""
    if device.type in ("cpu", "mps"):
        return _cpu_name(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = _module(device).get_device_properties(device)
    return properties.name, properties.total_memory


def memory_left(device: torch.device) -> tuple[int, int]:
    """Bytes that a device has, and how many are free now; on a CPU within the limit of the control group (Linux)."""
    if device.type not in ("cpu", "mps"):
        free, total = _module(device).mem_get_info(device)
        return total, free
    total = free = describe(device)[1]
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        free = int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # the file says "max" where there is no limit
        numbers = []
        for name in ("memory.max", "memory.current"):
            with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
                numbers.append(int(file.read()))
        total, free = min(total, numbers[0]), min(free, numbers[0] - numbers[1])
    return total, free


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def explain_out_of_memory(error: Exception, key: str) -> str | None:
    """A sentence where an exception says that memory is used up, with the setting that takes less; else None."""
    cause = str(error).strip().split("\n")[0][:200]
    signs = ("out of memory", "can't allocate memory")
    if not isinstance(error, torch.OutOfMemoryError) and not any(sign in cause.lower() for sign in signs):
        return None
    return f"Out of memory ({cause}); lower {key}, or see python -m minigpt4.doctor for what needs how much." + see(
        "out-of-memory"
    )


def on_host(tree: Any) -> Any:
    """Copies the tensors in dicts and lists to host memory, so that a file of them can be read without the device."""
    if isinstance(tree, dict):
        return {key: on_host(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(on_host, tree))
    return tree.cpu() if isinstance(tree, torch.Tensor) else tree


def move_to(tree: Any, device: torch.device) -> Any:
    """Copies the tensors in dicts, lists and tuples to a device; other values are returned as they are."""
    if isinstance(tree, dict):
        return {key: move_to(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [move_to(value, device) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree.to(device, non_blocking=device.type != "cpu") if isinstance(tree, torch.Tensor) else tree


def pins_memory(device: torch.device) -> bool:
    """Whether copies to the device are faster from pinned host memory."""
    return device.type not in ("cpu", "mps")


def synchronize(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


_GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
_CANNOT_RECORD: set[str] = set()  # kinds of devices on which it failed


def records(device: torch.device) -> bool:
    """Whether ``record`` may give something; false once it has failed."""
    backend = getattr(torch, device.type, None)
    return device.type not in _CANNOT_RECORD and hasattr(backend, _GRAPHS.get(device.type, "?"))


def record(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """Records work on fixed tensors, so that calling the result does it again in one launch; None where that fails.

    ``work`` is done three times on the way. After a failure the device's allocator may hold on to what it has.

    Raises:
        torch.OutOfMemoryError: there is no room for it now.
    """
    try:
        graph, stream = getattr(getattr(torch, device.type), _GRAPHS[device.type])(), torch.Stream(device)
        synchronize(device)
        with stream:
            work()  # libraries set themselves up, which cannot be recorded
            work()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, AttributeError, KeyError, TypeError) as error:
        _CANNOT_RECORD.add(device.type)
        cause = str(error.__context__ or error).strip()[:100]
        logging.warning("Work on %s cannot be recorded (%s); it is launched piece by piece.", device.type, cause)
        return None
    return graph.replay


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
        state["device"] = _module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts a state of ``random_state`` back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "device" in state and device.type not in ("cpu", "mps"):
        _module(device).set_rng_state(state["device"].cpu(), device)


@contextlib.contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generators for a block, and restores their states after it."""
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would look at every kind of device, for 0.2 ms
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def local_rank() -> int:
    """This process's place on its machine, 0 where torchrun did not start it."""
    return int(os.environ.get("LOCAL_RANK", 0))

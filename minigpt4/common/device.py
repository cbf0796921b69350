"""The only module that knows devices by name; all others hold a ``torch.device`` and ask here.

Built on ``torch.accelerator``, which has one kind of accelerator per process: NPU before CUDA before MPS.
"""

import contextlib
import ctypes
import functools
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from minigpt4.common.errors import UserError, see
from minigpt4.common.schema import RunConfig, read_section
from minigpt4.common.torch_setup import npu_mismatch, package_version

_BACKENDS = {"npu": "hccl", "cuda": "nccl"}
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_NATIVE_BF16 = ("avx512_bf16", "amx_bf16")  # names in /proc/cpuinfo and of torch.cpu.get_capabilities
_KINDS = ("auto", "cuda", "npu", "mps", "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def _log_once(message: str, level: int = logging.INFO) -> None:
    if os.environ.get("RANK", "0") == "0":  # the process group is not there yet
        logging.log(level, message)


def best() -> str:
    """Returns the best available kind of device: the accelerator of this process, else cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def pick(wanted: str = "auto", index: int = 0, is_strict: bool = False) -> torch.device:
    """Chooses this process's device: the wanted kind if it is available, else the best one, which is logged.

    ``wanted`` is auto, npu, cuda, mps or cpu, also with a number as in cuda:1; without one ``index`` is used.

    Raises:
        UserError: an unknown name, fewer devices than the number requires, or an unavailable kind with ``is_strict``.
    """
    kind, _, number = wanted.partition(":")
    if kind not in _KINDS or (number and not number.isdecimal()):
        raise UserError(f"run.device is '{wanted}'; expected {', '.join(_KINDS[:-1])} or cpu, or one as in cuda:1.")
    chosen = "cpu" if kind == "cpu" else best()
    if kind not in ("auto", chosen):
        reason = _why_unavailable(kind)  # the reference's YAML files all say cuda
        if is_strict:
            raise UserError(f"run.device is {wanted} and run.strict_device is set, but {reason}")
        advice = "; run.strict_device: True makes this an error" if chosen == "cpu" else ""
        level = logging.WARNING if chosen == "cpu" else logging.INFO
        _log_once(f"run.device is {kind}, which is not available ({reason}) Using {chosen}{advice}.", level)
    if chosen in ("cpu", "mps"):
        return torch.device(chosen)
    device = torch.device(chosen, int(number or index))
    count = torch.accelerator.device_count()
    if device.index >= count:
        raise UserError(
            f"Device {device} was requested, but {count} of that kind are visible{_visible_devices(chosen)}; start "
            "fewer processes per machine (torchrun --nproc-per-node) or make more devices visible."
        )
    if chosen == "npu":
        _set_up_npu(device)
    use(device)
    return device


def _visible_devices(kind: str) -> str:
    variable = _VISIBLE.get(kind)
    return f" ({variable} is {os.environ.get(variable, 'not set')})" if variable else ""


def _why_unavailable(kind: str) -> str:
    if kind == "npu" and package_version("torch_npu") is None:
        return "torch_npu is not installed: pip install -r requirements-npu.txt."
    if kind == "cuda" and not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA: install the CUDA build of the same version."
    if kind == "mps":
        return f"torch {torch.__version__} finds no mps device."
    tool = "npu-smi" if kind == "npu" else "nvidia-smi"
    return f"no {kind} device is found{_visible_devices(kind)}: check the driver with {tool}."


def _set_up_npu(device: torch.device) -> None:
    if mismatch := npu_mismatch():
        raise UserError(mismatch)
    module = torch.get_device_module(device)
    module.set_compile_mode(jit_compile=False)  # precompiled operators: shapes change with every batch
    module.config.allow_internal_format = False  # weights keep the layout of the checkpoints
    # Lengths change with every batch; expandable segments avoid fragmentation.
    os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory of its own, to which copies are faster from pinned host memory."""
    return device.type not in ("cpu", "mps")


def use(device: torch.device) -> None:
    """Makes a device the current one of this thread; every thread that serves requests has to call it."""
    if device.index is not None and has_own_memory(device):
        torch.accelerator.set_device_index(device.index)


def release_threads() -> None:
    """Ends the idle threads that share this thread's operations on a CPU; the next operation starts new ones.

    For a thread that leaves all computing to another one: while a process has more such threads than there are
    processors, GNU's OpenMP lets them sleep between two operations; the API then decoded one answer 0.73 times as fast.
    """
    if torch.get_num_threads() == 1:  # in a process that was forked from one with several, it would wait for ever
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another OpenMP, or Windows
        ctypes.CDLL(None).omp_pause_resource_all(1)  # omp_pause_soft of OpenMP 5.0


def set_threads(count: int) -> None:
    """How many threads share this thread's operations on a CPU."""
    torch.get_num_threads()  # otherwise the first operation of a new thread takes the number that any thread set last
    torch.set_num_threads(count)


def from_config(run_cfg: Any) -> torch.device:
    """Chooses this process's device from the ``run`` section of a configuration (None: all defaults)."""
    cfg = read_section(RunConfig, run_cfg, "run")
    return pick(cfg.device, int(os.environ.get("LOCAL_RANK", 0)), cfg.strict_device)


def backend(device: torch.device) -> str:
    """Returns the process-group backends of a device: its own, and gloo for tensors in host memory."""
    return f"cpu:gloo,{device.type}:{_BACKENDS[device.type]}" if device.type in _BACKENDS else "gloo"


def is_from_backend(error: Exception) -> bool:
    """Whether an exception comes from a communication library."""
    names = ("gloo", "ProcessGroup", *(name.upper() for name in _BACKENDS.values()))
    return any(name in str(error) for name in names)


def default_dtype(device: torch.device) -> torch.dtype:
    """Returns the default precision of the LM and of autocast: bf16 where native, else fp16, on CPUs fp32.

    The meta device stands for a current accelerator that is not present, as do the functions below.
    """
    if device.type == "meta":
        return torch.bfloat16
    if device.type == "cpu":
        return torch.bfloat16 if _has_native_bf16() else torch.float32
    has_bf16 = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bf16 else torch.float16


@functools.cache
def _has_native_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; without AVX512_BF16 or AMX they are slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in all supported versions
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _NATIVE_BF16)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux
        flags = next((line for line in file if line.startswith("flags")), "").split()
        return any(name in flags for name in _NATIVE_BF16)
    return False


def amp_dtype(run_cfg: RunConfig, device: torch.device) -> torch.dtype:
    """Returns the precision of a run's autocast; float32 means none."""
    if not run_cfg.amp:
        return torch.float32
    dtype = DTYPES[run_cfg.amp_dtype] if run_cfg.amp_dtype else default_dtype(device)
    if dtype == torch.float32:
        _log_once("run.amp: computing in float32" + ("." if run_cfg.amp_dtype else ", the fastest on this device."))
    return dtype


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether torch's fused AdamW, which can skip an update without synchronising, is known to work there."""
    return device.type in ("cpu", "cuda")


def has_quantization(device: torch.device) -> bool:
    """Whether weights of 8 and 4 bits are known to work there."""
    return device.type in ("cpu", "cuda", "meta")


def compiles(device: torch.device) -> bool:
    """Whether ``run.compile`` is used: Inductor generates kernels for CUDA; on a CPU it gained nothing."""
    return device.type == "cuda"


def recorder(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What records the kernels of a function, as ``_record`` does; None where this is not known to work."""
    return functools.partial(_record, device) if device.type == "cuda" else None


def _record(device: torch.device, function: Callable[[], None]) -> Callable[[], None]:
    """Records the kernels that a function launches, without computing them; returns a function that launches them all.

    All tensors must keep their addresses, and the function must have run once on this thread. RuntimeError where it
    waits for the device or the memory is short.
    """
    module = torch.get_device_module(device)
    graph, stream = module.CUDAGraph(), module.Stream(device)
    stream.wait_stream(module.current_stream(device))
    with module.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    module.current_stream(device).wait_stream(stream)
    return graph.replay


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Returns autocast in ``dtype``; a context that does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler | None:
    """Returns a dynamic loss scaler for fp16, else None."""
    return torch.amp.GradScaler(device.type) if dtype == torch.float16 else None


def max_memory_mib(device: torch.device) -> float:
    """Returns the peak memory in MiB: of the device, or on a CPU of the process."""
    if device.type == "cpu":
        import resource  # Unix only

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measure = getattr(torch.get_device_module(device), "max_memory_allocated", lambda _: 0)
    return measure(device) / 2**20


def memory_left(device: torch.device) -> tuple[int, int]:
    """Returns the total and the free memory in bytes; on a CPU within the limits of the control group (Linux)."""
    if has_own_memory(device):
        free, total = torch.get_device_module(device).mem_get_info(device)
        return total, free
    import psutil  # comes with accelerate

    memory = psutil.virtual_memory()
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit: the file says "max"
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        return min(memory.total, limit), min(memory.available, limit - used)
    return memory.total, memory.available


def explain_out_of_memory(error: Exception, key: str) -> str | None:
    """Returns a sentence about an out-of-memory error, with the key to lower; None for other errors."""
    cause = str(error).strip().split("\n")[0][:200]
    signs = ("out of memory", "can't allocate memory")  # of accelerators and of the host
    if not any(sign in cause.lower() for sign in signs):
        return None
    advice = f"lower {key}, or run python -m minigpt4.doctor, which reports the memory of each part."
    return f"Out of memory ({cause}); {advice}" + see("out-of-memory")


def move_to(tree: Any, device: torch.device) -> Any:
    """Copies the tensors in dicts, lists and tuples to a device; other values are returned as they are."""
    if isinstance(tree, dict):
        return {key: move_to(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [move_to(value, device) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree.to(device, non_blocking=device.type != "cpu") if isinstance(tree, torch.Tensor) else tree


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the random state of this process as tensors and plain values, which ``weights_only`` loading accepts."""
    kind, keys, *rest = numpy.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if has_own_memory(device):
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores a state returned by ``random_state``."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "device" in state and has_own_memory(device):
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


@contextlib.contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generators for a block and restores their states afterwards."""
    state = random_state(torch.device("cpu"))
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed visits every kind of device: 0.2 ms
    try:
        yield
    finally:
        set_random_state(state, torch.device("cpu"))

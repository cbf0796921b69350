"""Processes under torchrun: rank and world size, the process group, collectives of objects, and a clean end."""

import atexit
import ctypes
import functools
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.common.schema import RunConfig, read_section

Result = TypeVar("Result")
# They end a training with a checkpoint. A terminal that is closed sends SIGHUP, schedulers SIGTERM, SIGUSR1 or SIGUSR2.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded now, and not between fork and exec


def end_with_parent(number: int) -> None:
    """Has the kernel send this process a signal when the one that started it ends (on Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def is_dist_avail_and_initialized() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Returns this process's rank over all machines."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_world_size() -> int:
    """Returns the number of processes over all machines."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which writes the files and the log."""
    return get_rank() == 0


def main_process(function: Callable[..., Result]) -> Callable[..., Result | None]:
    """Decorator: the function runs on rank 0 only and returns None elsewhere."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Result | None:
        return function(*args, **kwargs) if is_main_process() else None

    return wrapper


def init_distributed_mode(run_cfg: Any) -> torch.device:
    """Selects this process's device by the ``run`` section or ``RunConfig`` and, under torchrun, joins the group.

    Raises:
        UserError: the device is not available, or the processes cannot connect.
    """
    run_cfg = read_section(RunConfig, run_cfg, "run")
    device = devices.from_config(run_cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not is_dist_avail_and_initialized():
        timeout = timedelta(seconds=run_cfg.dist_timeout)
        try:
            store, rank, world_size = next(dist.rendezvous(run_cfg.dist_url, timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # After a restart, torchrun's own store still holds the addresses of the previous processes.
                store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            dist.init_process_group(
                devices.backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout
            )
            broadcast_object(None)  # fails here if a rank cannot be reached
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise UserError(_explain_connection(error)) from error
        atexit.register(_leave)
    return device


def _explain_connection(error: Exception) -> str:
    cause = str(error).strip().split("\n")[0][:200]
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    host, port, rank, world_size = (os.environ.get(name, "?") for name in names)
    if "EADDRINUSE" in cause or "address already in use" in cause.lower():
        return f"Port {host}:{port} is in use by another program; set another with torchrun --master-port."
    where = f"{host}:{port} (rank {rank} of {world_size}: {cause})"
    return f"The processes could not connect at {where}; see docs/DISTRIBUTED.md."


def explain_lost_peer(error: Exception) -> str | None:
    """Returns a sentence about an exception that reports the loss of another process, else None."""
    if get_world_size() == 1 or not (isinstance(error, dist.DistError) or devices.is_from_backend(error)):
        return None
    cause = str(error).strip().splitlines()[0][:160]
    return (
        f"Rank {get_rank()} lost contact with another rank ({cause}); the rank that failed first reports the reason. "
        "With run.resume: auto the same command resumes from the newest checkpoint."
    )


def assert_same_config(config: dict[str, Any]) -> None:
    """Raises UserError on all ranks if one was started with another configuration (plain containers)."""
    first, *others = gather_objects(_flatten(config))
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"{key} is {other.get(key)!r} on rank {rank} and {first.get(key)!r} on rank 0; "
                    "start all ranks with the same file and options."
                )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in _flatten(part, f"{prefix}.{name}".lstrip(".")).items()}


def run_on_main(function: Callable[[], Result]) -> Result:
    """Runs a function on rank 0; every rank gets its result or its UserError."""
    outcome = (None, None)
    if is_main_process():
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, message = broadcast_object(outcome)
    if message is not None:
        raise UserError(message)
    return result


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all ranks on every rank, in rank order."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the ranks, in place; not every backend can reduce by means."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def lockstep(items: Iterable[Result]) -> Iterator[tuple[Result, bool]]:
    """Yields (item, True) and, where other ranks have more items, (rank 0's first, False) until no rank has any."""
    filler = None
    for item in itertools.chain(items, itertools.repeat(None)):
        if not any(gather_objects(item is not None)):
            return
        filler = broadcast_object(item) if filler is None else filler
        yield (item, True) if item is not None else (filler, False)


def abort(message: str) -> NoReturn:
    """Ends this process with status 1 and a message on the console.

    If all ranks have the same error it is printed once: the others wait two seconds, in which torchrun ends them.
    """
    rank, is_alone = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) == 1
    if rank > 0:
        time.sleep(2)
    print(f"error: {f'[rank {rank}] ' if rank else ''}{message}", file=sys.stderr, flush=True)
    # Several processes: without waiting for the threads of a process group whose other members may no longer run.
    sys.exit(1) if is_alone else os._exit(1)


def shutdown() -> None:
    """Closes the process group after a successful run; a single process has none."""
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()


def _leave() -> None:
    """Exit handler: ends a rank after ``shutdown`` with status 0, before Python finalises its interpreter.

    gloo's threads release Python objects of the last collectives a moment later; in a finalised interpreter they would
    abort the process. Handlers registered after the process group was initialised run before this one.
    """
    if not is_dist_avail_and_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

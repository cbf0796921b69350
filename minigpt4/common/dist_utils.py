"""Processes under torchrun: who am I, how many are we, and what do we agree on."""

import atexit
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError

Result = TypeVar("Result")


def is_dist_avail_and_initialized() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's number over all machines."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_world_size() -> int:
    """The number of processes over all machines."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes the files and the log."""
    return get_rank() == 0


def main_process(function: Callable[..., Result]) -> Callable[..., Result | None]:
    """Lets a function run on the main process only; elsewhere it returns None."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Result | None:
        return function(*args, **kwargs) if is_main_process() else None

    return wrapper


def init_distributed_mode(run_cfg: Any) -> torch.device:
    """Picks the device of ``run_cfg.device`` and, under torchrun, joins the process group of its backend.

    The run configuration is read, not changed. Returns this process's device.

    Raises:
        UserError: the device is not there, or the processes cannot meet.
    """
    device = devices.of_run(run_cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not is_dist_avail_and_initialized():
        timeout = timedelta(seconds=float(run_cfg.get("dist_timeout", 1800)))
        try:
            store, rank, world_size = next(dist.rendezvous(run_cfg.get("dist_url", "env://"), timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # After a restart, torchrun's own store still holds the addresses of the processes that are gone.
                store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            dist.init_process_group(
                devices.backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout
            )
            broadcast_object(None)  # whoever cannot be reached shows here
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise UserError(_why_apart(error)) from error
    return device


def _why_apart(error: Exception) -> str:
    cause = str(error).strip().split("\n")[0][:200]
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if "EADDRINUSE" in cause or "address already in use" in cause.lower():
        return f"Port {place} is in use by another program; set another with torchrun --master-port or --standalone."
    rank = f"rank {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
    return f"The processes could not meet at {place} ({rank}: {cause}); see docs/DISTRIBUTED.md."


def explain_lost_peer(error: Exception) -> str | None:
    """A sentence where an exception tells that another process of the group is gone, else None."""
    if get_world_size() == 1 or not (isinstance(error, dist.DistError) or devices.is_from_backend(error)):
        return None
    cause = str(error).strip().splitlines()[0][:160]
    return (
        f"Rank {get_rank()} lost contact with another rank ({cause}); the message of the rank that failed first says "
        "why. With run.resume: auto the same command goes on from the newest checkpoint."
    )


def assert_same_config(config: dict[str, Any]) -> None:
    """Raises UserError on all ranks where one was started with another configuration (plain containers)."""
    first, *others = gather_objects(_flat(config))
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"{key} is {other.get(key)!r} on rank {rank} and {first.get(key)!r} on rank 0; "
                    "start all ranks with the same file and options."
                )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def run_on_main(function: Callable[[], Result]) -> Result:
    """Runs a function on the main process; its result, or its UserError, reaches every rank."""
    outcome = (None, None)
    if is_main_process():
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, mistake = broadcast_object(outcome)
    if mistake is not None:
        raise UserError(mistake)
    return result


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns every rank's value on every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * get_world_size()
    dist.all_gather_object(box, value)
    return box


def lockstep(items: Iterator[Result]) -> Iterator[tuple[Result, bool]]:
    """Lets all ranks take as many items as the one with the most, for work that they can only do together.

    Yields:
        (item, True) and, on a rank that has run out, (rank 0's first item, False) until all have.
    """
    spare = None
    for item in itertools.chain(items, itertools.repeat(None)):
        if not any(gather_objects(item is not None)):
            return
        spare = broadcast_object(item) if spare is None else spare
        yield (item, True) if item is not None else (spare, False)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the ranks, in place; sums and not means, as not every backend has those."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def abort(mistake: str) -> NoReturn:
    """Ends this process with a message on the console.

    A mistake that all ranks make is told once: the others wait a little, in which torchrun ends them.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        time.sleep(2)
    sys.stderr.write(f"error: {f'[rank {rank}] ' if rank else ''}{mistake}\n")
    sys.stderr.flush()
    # Without waiting for threads of a process group whose other members may be gone.
    os._exit(1) if world > 1 else sys.exit(1)


def shutdown() -> None:
    """Ends this process where it is one of several that are done; a single one returns, and ends as Python does.

    Python's way out meets gloo's threads, which ask for the interpreter to give back what the last collectives held.
    Where it is gone already the process aborts, and torchrun takes a finished run for a failed one.
    """
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

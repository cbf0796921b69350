"""Processes under torchrun: who am I, how many are we, and what do we agree on."""

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minigpt4.common import device as devices

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
    """
    device = devices.of_run(run_cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not is_dist_avail_and_initialized():
        dist.init_process_group(
            devices.backend(device), init_method=run_cfg.get("dist_url", "env://"), timeout=timedelta(minutes=100)
        )
        dist.barrier()
    return device


def agree(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Returns every rank's value on every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * get_world_size()
    dist.all_gather_object(box, value)
    return box


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the ranks, in place; sums and not means, as not every backend has those."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def leave() -> None:
    """Leaves the process group, where there is one."""
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()

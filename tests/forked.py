"""train.py in forks of this process, which has everything imported already; a function can prepare each of them.

They draw no report.png, which would take longer than the training; test_end_to_end.py has runs that do. programs.py
runs any other program.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager

import torch

import train
from minigpt4.datasets import builders  # noqa: F401
from minigpt4.models import MiniGPT4  # noqa: F401
from minigpt4.runners import RunnerBase, runner_base  # noqa: F401


def start(arguments, log, before=lambda: None):
    """Starts train.py with the given arguments; ``before`` runs in the new process first. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.argv = ["train.py", *map(str, arguments)]
        torch.set_num_threads(1)
        runner_base.write_report = lambda folder: None
        before()
        train.main()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid):
    """The exit status of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid, seconds):
    """Kills a process -9 after a while; returns its exit status."""
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


@contextmanager
def environment(**values):
    """Environment variables for a block."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port():
    """A TCP port that nobody uses now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(world, arguments, log, before=lambda rank: None, rank_arguments=None):
    """Starts ``world`` ranks of train.py as torchrun would; returns their pids."""
    pids, port = [], free_port()
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        with environment(**names, MASTER_ADDR="127.0.0.1", MASTER_PORT=port):
            mine = [*arguments, *(rank_arguments or {}).get(rank, [])]
            pids.append(start(mine, f"{log}.{rank}", lambda rank=rank: before(rank)))
    return pids

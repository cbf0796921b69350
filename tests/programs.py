"""Python programs without the seconds of their imports: a process that has imported everything forks for each of them.

    with Programs() as programs:
        done = programs.run(["train.py", "--cfg-path", "FILE"])  # as subprocess.run([sys.executable, ...]) gives it

The process has no threads and nothing of pytest, so a program finds the interpreter that it would start itself.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = [
    "minigpt4.common.torch_setup", "minigpt4.common.dist_utils", "minigpt4.common.logger",
    "minigpt4.conversation.conversation", "minigpt4.datasets.builders", "minigpt4.doctor.checks", "minigpt4.models",
    "minigpt4.processors", "minigpt4.runners", "minigpt4.serve.server", "minigpt4.serve.terminal", "minigpt4.tasks",
    "accelerate", "matplotlib.backends.backend_agg", "matplotlib.figure", "peft", "torch.distributed.device_mesh",
    "torch.distributed.fsdp", "torch.nn.parallel", "transformers.models.llama.modeling_llama",
]  # fmt: skip


class Programs:
    """Starts programs in one environment, to which each can add; the process starts with the first of them."""

    def __init__(self, **environment):
        self.environment = environment
        self._server = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._server:
            self._server.communicate()

    def _ask(self, request):
        if self._server is None:
            own = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen([sys.executable, __file__], env=own, cwd=ROOT, text=True, **pipes)
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, arguments, files, folder=ROOT, is_session=False, **environment):
        """What follows ``python``, with files for the standard streams; returns its pid."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, **environment}
        request = {"arguments": list(map(str, arguments)), "files": list(map(str, files)), "folder": str(folder)}
        return self._ask({**request, "environment": environment, "is_session": is_session})

    def wait(self, pid, seconds=300):
        """The exit status, negative where a signal ended the program; None if it goes on for so many seconds."""
        return self._ask({"pid": pid, "seconds": seconds})

    def running(self, arguments, errors=None):
        """A program that runs beside the caller, to the end of a ``with`` block; its errors may go to a file."""
        return Running(self, arguments, errors)

    def run(self, arguments, input="", folder=ROOT, **environment):
        """Runs a program to its end; returns what ``subprocess.run`` would."""
        (done,) = self.run_ranks([arguments], input, folder, **environment)
        return done

    def run_ranks(self, each, input="", folder=ROOT, **environment):
        """Runs a program with each of some arguments, all at once, as torchrun would if there are several."""
        from forked import free_port

        names = [{} for _ in each]
        if len(each) > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            size = {"WORLD_SIZE": str(len(each)), "LOCAL_WORLD_SIZE": str(len(each))}
            names = [{"RANK": str(i), "LOCAL_RANK": str(i), **size, **address} for i in range(len(each))]
        with tempfile.TemporaryDirectory() as temporary:
            files = [[Path(temporary, f"{name}{i}") for name in ("in", "out", "err")] for i in range(len(each))]
            for own in files:
                own[0].write_text(input, encoding="utf-8")
            pids = [
                self.start(arguments, own, folder, **environment, **rank)
                for arguments, own, rank in zip(each, files, names, strict=True)
            ]
            statuses = [self.wait(pid) for pid in pids]
            texts = [[file.read_text(encoding="utf-8") for file in own[1:]] for own in files]
            for pid, status, text in zip(pids, statuses, texts, strict=True):
                if status is None:
                    os.kill(pid, signal.SIGKILL)
                    raise TimeoutError(f"{each}: {text}")
        rows = zip(each, statuses, texts, strict=True)
        return [subprocess.CompletedProcess(arguments, status, *text) for arguments, status, text in rows]


class Running:
    """A program that runs beside the caller: ``stdin`` for it, ``stdout`` with what it writes."""

    def __init__(self, programs, arguments, errors):
        self._programs = programs
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        files = [f"/proc/{os.getpid()}/fd/{number}" for number in (theirs_in, theirs_out)]
        self.pid = programs.start(arguments, [*files, errors or files[1]])
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_in, "w"), os.fdopen(ours_out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:
            self.send_signal(signal.SIGKILL)
            self.wait()
        self.stdin.close()
        self.stdout.close()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, seconds=20):
        """The exit status."""
        status = self._programs.wait(self.pid, seconds)
        assert status is not None
        self.pid = None
        return status


def serve():
    """Answers requests, one a line. It returns in a new process only, with what this has to run."""
    with contextlib.redirect_stdout(sys.stderr):
        for name in IMPORTED:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection of a program, the last one included, visits what is imported
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = wait(request["pid"], request["seconds"])
        else:
            ready, request["is_ready"] = os.pipe()
            if not (answer := os.fork()):
                os.close(ready)
                return request
            os.close(request["is_ready"])
            os.read(ready, 1)  # ends once the program has opened its files
            os.close(ready)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def wait(pid, seconds):
    """The exit status of a process, None if it does not end in time."""
    end = time.monotonic() + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]) if ended[0] else None


def become(arguments, files, folder, environment, is_session, is_ready):
    """Runs as ``python ARGUMENTS`` would in a new process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if is_session:
        os.setsid()  # the terminal that is opened next becomes its own
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY, 0o600), number)
    os.close(is_ready)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace", buffering=1)
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])
        arguments = arguments[2:]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    if arguments[0] == "-m":
        sys.path[0], sys.argv = folder, arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[0], sys.argv = folder, ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).parent.resolve()), arguments
        exec(compile(Path(arguments[0]).read_bytes(), arguments[0], "exec"), module.__dict__)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    become(**serve())

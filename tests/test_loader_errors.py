"""Loaders: whatever fails in a data set or a worker ends the run with its reason, and no process remains."""

import os
import pickle
import signal
import tempfile
import time

import forked
import psutil
import pytest
import torch
from data_samples import EVAL, make_loader
from own_datasets import Numbers, Stream
from torch.utils.data import IterableDataset

from minigpt4.common.errors import UserError
from minigpt4.datasets import loader
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.datasets.pairs import Pair
from minigpt4.datasets.loader import eval_batches

pytestmark = pytest.mark.usefixtures("time_limit")


class Broken(Numbers):
    """An own data set with one sample that raises, or kills its worker."""

    def __init__(self, failure):
        super().__init__(40)
        self.failure = failure

    def __getitem__(self, index):
        if index == 7 and self.failure == "a signal":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 7:
            raise self.failure("seven")
        return {"index": index}


class BrokenStream(IterableDataset):
    def __iter__(self):
        yield from ({"index": i} for i in range(5))
        raise OSError("the disk is gone")


class ListCollater(Numbers):
    def collater(self, samples):
        return samples


class Unsendable(Numbers):
    def collater(self, samples):
        return {"index": lambda: samples}


class Wide(Numbers):
    def __getitem__(self, index):
        return {"image": torch.zeros(3, 2, 2 + index)}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Broken(KeyError), "KeyError: 'seven'"),
        (Broken(MemoryError), "MemoryError: seven"),
        (Broken(StopIteration), "StopIteration: seven"),
        (BrokenStream(), "OSError: the disk is gone"),
        (ListCollater(4), "batches of type list; expected dicts"),
        (Wide(4), "failed with RuntimeError: "),
        (Stream(0), "gives no sample to loader worker 0 of"),
    ],
    ids=["KeyError", "MemoryError", "StopIteration", "stream", "no dict", "other sizes", "empty stream"],
)
def test_whatever_fails_arrives_with_its_reason(dataset, words, num_workers, caplog):
    with pytest.raises(UserError, match="Data set mine") as error:
        list(make_loader({"mine": dataset}, num_workers=num_workers, iters_per_epoch=40).iter_epoch(0))
    assert words in str(error.value)


def test_the_traceback_is_logged(caplog):
    with pytest.raises(UserError, match="its traceback is in the log above"):
        list(make_loader({"mine": Broken(KeyError)}, iters_per_epoch=40).iter_epoch(0))
    assert "Data set mine failed" in caplog.text and "test_loader_errors.py" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_user_error_in_a_worker_arrives_as_it_is(tmp_path, num_workers):
    dataset = PairDataset("mine", [Pair(tmp_path / "no.jpg", "c")], EVAL)
    with pytest.raises(UserError, match=r"^Data set mine has no usable sample"):
        list(make_loader({"mine": dataset}, num_workers=num_workers).iter_epoch(0))


PROGRAM = """
import os
import sys
import tempfile
import time
sys.path[:0] = ["tests", "."]
import test_loader_errors
from data_samples import make_loader
dataset = {dataset}
try:
    for batch in make_loader({{"mine": dataset}}, num_workers={num_workers}, iters_per_epoch=40).iter_epoch(0):
        {inside}
except test_loader_errors.UserError as error:
    sys.exit(f"error: {{error}}")
"""


@pytest.fixture
def run_program(programs):
    def run(dataset, num_workers=2, inside="pass"):
        return programs.run(["-c", PROGRAM.format(dataset=dataset, num_workers=num_workers, inside=inside)])

    return run


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("test_loader_errors.Broken(KeyError)", "error: Data set mine failed with KeyError: 'seven'"),
        ("test_loader_errors.Unsendable(4)", "error: Data set mine failed with "),
        ("test_loader_errors.BrokenStream()", "error: Data set mine failed with OSError"),
    ],
)
def test_a_failure_in_a_worker_ends_the_process(run_program, dataset, words):
    done = run_program(dataset)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(words), done.stderr


def test_a_killed_worker_ends_the_process(run_program):
    """Where torch notices it differs: in the loader, or by a signal anywhere in the main thread."""
    done = run_program("test_loader_errors.Broken('a signal')")
    assert done.returncode == 1
    assert any(words in done.stderr for words in ("The loader of data set mine failed", "is killed by signal"))


def test_an_exception_ends_the_process_and_its_workers(run_program):
    done = run_program("test_loader_errors.Stream(8)", inside="raise RuntimeError('something else')")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("RuntimeError: something else")


def test_a_fork_that_ends_does_not_end_workers(run_program):
    inside = "os.fork() or sys.exit()\n        os.wait()\n        break\n    else:\n        sys.exit('no batch')\n"
    inside += "    dataset = list(make_loader({'mine': dataset}, num_workers=1, iters_per_epoch=3).iter_epoch(0))\n"
    done = run_program("test_loader_errors.Numbers(40)", inside=inside + "    print(len(dataset))")
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


class Spawned(Exception):
    """Raised in place of starting workers."""


@pytest.mark.parametrize("dataset", ["pairs", "shards", "map-style", "iterable"])
def test_workers_can_be_spawned(pairs, shards, monkeypatch, dataset):
    """macOS starts workers so: whatever they get is pickled."""

    def check(dataset, sampler=None, **settings):
        pickle.dumps((dataset, settings["collate_fn"], settings["worker_init_fn"]))
        raise Spawned

    datasets = {"pairs": PairDataset("x", pairs, EVAL), "shards": ShardDataset("x", shards, EVAL)}
    datasets |= {"map-style": Numbers(8), "iterable": Stream(8)}
    monkeypatch.setattr("minigpt4.datasets.loader.DataLoader", check)
    for batches in (
        make_loader({"x": datasets[dataset]}, num_workers=1).iter_epoch(0),
        iter(eval_batches("x", datasets[dataset], 2, 1, seed=0)),
    ):
        with pytest.raises(Spawned):
            next(batches)


class Slow(IterableDataset):
    def __init__(self, sample, seconds):
        self.sample, self.seconds = sample, seconds

    def __iter__(self):
        for _ in range(100):
            time.sleep(self.seconds)
            yield self.sample


@pytest.mark.parametrize("moment", ["at the first batch", "before a worker knows its rank", "waiting for a pipe"])
def test_the_workers_of_a_killed_run_end_and_leave_no_files(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begin, is_early, is_full = loader._init_worker, moment.startswith("before"), moment.startswith("waiting")

    def begin_late(rank, *arguments):
        while is_early and os.getppid() == rank:
            time.sleep(0.01)
        begin(rank, *arguments)

    monkeypatch.setattr(loader, "_init_worker", begin_late)
    dataset = Slow({"text_input": "a caption" * 10_000}, 0.01) if is_full else Slow({"image": torch.ones(1000)}, 0.3)
    batches = loader.TrainLoader({"x": dataset}, {}, 1, iters_per_epoch=100, num_workers=2, seed=0)
    pid = os.fork()
    if not pid:
        try:
            for _ in batches.iter_epoch(0):
                time.sleep(60 * is_full)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while len(workers := psutil.Process(pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert forked.kill_after(pid, 1.0 if is_full else 0.15) == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert not alive and not list(tmp_path.iterdir())

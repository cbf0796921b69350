"""A long run of everything at once, with faults, and a table of what it leaves behind.

    python -m tests.soak --minutes 60

Four parties share the machine: an undisturbed training run; the same run, killed or stopped at random moments and
resumed; ``demo.py --api``; and its clients, some of which are slow, vanish or send garbage. Both runs train from shards
with damaged members, validate and save. Linux only.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import psutil

if __name__ == "__main__":  # python -m tests.soak
    sys.path.insert(0, str(Path(__file__).parent))

from soak_clients import Server, start_clients
from soak_processes import Verdict, Watched, expect_none, remaining_children
from soak_training import (
    RestartedRun,
    compare_records,
    read_records,
    record_steps,
    train_command,
    write_data,
)

PR_SET_CHILD_SUBREAPER = 36  # orphans of killed processes become children of this process
# The line after the header; not that of a loader's worker whose process was killed while it passed on a batch.
TRACEBACK = re.compile(r'Traceback \(most recent call last\):\n(?!.*/multiprocessing/resource_sharer\.py")(.*)')


class Soak:
    """The four parties and the folder they work in.

    Args:
        seconds: how long they run.
        seed: of kills, stops and requests.
        folder: an empty folder for data, logs and checkpoints.
    """

    def __init__(self, seconds: float, seed: int, folder: Path) -> None:
        import forked

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder, self.temporary, self.report = folder, folder / "tmp", folder / "clients.json"
        self.temporary.mkdir()
        self.shared_memory = set(os.listdir("/dev/shm"))
        os.environ.update(TMPDIR=str(self.temporary), OMP_NUM_THREADS="1")
        tempfile.tempdir = None  # forgets the folder looked up before
        write_data(folder / "data")
        self.server = Server(folder, forked.free_port(), "--batch-size", "4")
        self.expected = self.server.answers()
        self.start = time.monotonic()
        self.seconds = seconds
        self.clients = start_clients(self.server.port, self.expected, self.start + seconds, seed, self.report)
        commands = {}
        for name in ("undisturbed", "restarted"):
            (folder / name).mkdir()
            commands[name] = train_command(folder / "data", folder / name / "out")
        records = folder / "undisturbed" / "records"
        log = folder / "undisturbed" / "log"
        self.undisturbed = forked.start(commands["undisturbed"], log, lambda: record_steps(records))
        moments = (1.6, 6.0) if seconds < 240 else (3.0, 30.0)
        self.restarted = RestartedRun(commands["restarted"], folder / "restarted", Random(seed), moments)
        processes = {"server": self.server.process.pid, "run": self.undisturbed}
        self.watched = [Watched(name, psutil.Process(pid), seconds=seconds) for name, pid in processes.items()]

    def run(self) -> None:
        """Restarts one run and samples the processes until the time is up and both runs have finished an epoch."""
        interval = min(5.0, self.seconds / 80)
        next_sample, deadline = self.start, self.start + max(4 * self.seconds, 240)
        while (now := time.monotonic()) < self.start + self.seconds or (now < deadline and not self._have_epochs()):
            time.sleep(min(0.25, interval / 2))
            self.restarted.tick()
            if time.monotonic() >= next_sample:
                next_sample += interval
                for process in self.watched:
                    process.sample()

    def _have_epochs(self) -> bool:
        runs = (self.folder / name / "records" for name in ("undisturbed", "restarted"))
        return all(file.exists() and '"epoch 1"' in file.read_text() for file in runs)

    def stop(self) -> list[Verdict]:
        """Ends all parties and judges what they did."""
        import forked

        is_alive = os.waitpid(self.undisturbed, os.WNOHANG)[0] == 0
        os.kill(self.undisturbed, signal.SIGTERM)
        run_status = forked.wait(self.undisturbed) if is_alive else "ended early"
        self.restarted.end(signal.SIGTERM)
        clients_status = forked.wait(self.clients)
        afterwards = self.server.answers()
        self.server.process.send_signal(signal.SIGTERM)
        server_status = self.server.process.wait(60)
        self.counts, wrong = json.loads(self.report.read_text(encoding="utf-8"))
        num_answered = sum(count for name, count in self.counts.items() if name.endswith(", answered"))
        records = [read_records((self.folder / name / "records").open()) for name in ("undisturbed", "restarted")]
        return [
            *compare_records(*records),
            *(verdict for process in self.watched for verdict in process.verdicts()),
            expect_none("restarts that failed", self.restarted.failures),
            expect_none("answers that were wrong", wrong),
            Verdict("answers that were right", str(num_answered), "more than 0", num_answered > 0),
            Verdict("the server's answers afterwards", "", "as before", afterwards == self.expected),
            Verdict(
                "status of run, clients and server at the end",
                f"{run_status}, {clients_status}, {server_status}",
                "0, 0, 0",
                (run_status, clients_status, server_status) == (0, 0, 0),
            ),
            expect_none("processes left", remaining_children()),
            *self._leftovers(),
        ]

    def _leftovers(self) -> list[Verdict]:
        logs = [self.server.log, self.folder / "undisturbed/log", self.folder / "restarted/log"]
        checkpoints = list((self.folder / "undisturbed/out").rglob("checkpoint_*.pth"))
        return [
            expect_none("temporary files left", os.listdir(self.temporary)),
            expect_none("shared memory left", sorted(set(os.listdir("/dev/shm")) - self.shared_memory)),
            expect_none("partial files left", [str(p.relative_to(self.folder)) for p in self.folder.rglob("*.tmp")]),
            Verdict("checkpoints of the run", str(len(checkpoints)), "3 (2 and the best)", len(checkpoints) == 3),
            expect_none(
                "tracebacks in logs",
                [line for log in logs for line in TRACEBACK.findall(log.read_text(errors="replace"))],
            ),
        ]

    def summary(self) -> dict[str, Any]:
        """What was done."""
        return {
            "seconds": round(time.monotonic() - self.start),
            "restarts": dict(self.restarted.ends),
            "requests": dict(sorted(self.counts.items())),
            "samples of processes": [len(process.rows) for process in self.watched],
        }


def main() -> int:
    """Runs a soak and prints its table; the exit status is 1 if a line is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and checkpoints")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(60 * args.minutes, args.seed, folder)
    soak.run()
    verdicts = soak.stop()
    print("| | actual | expected | |\n|---|---|---|---|")
    for verdict in verdicts:
        print(f"| {verdict.what} | {verdict.actual} | {verdict.expected} | {'good' if verdict.is_good else 'BAD'} |")
    print(json.dumps(soak.summary(), indent=1))
    if args.json:
        result = {"verdicts": verdicts, "summary": soak.summary()}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.keep:
        print(folder)
    else:
        shutil.rmtree(folder)
    return int(not all(verdict.is_good for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())

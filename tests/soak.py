"""A long run of everything at once, with faults, and a table of what it left behind: python -m tests.soak --minutes 60

Four parties share the machine: a training run that nothing happens to; the same run, killed or told to stop at random
moments and resumed; ``demo.py --api``; and its clients, of whom some are slow, some vanish and some send garbage. Both
runs train from shards with damaged members, validate and save. Linux only.
"""

import argparse
import base64
import ctypes
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
BATCH = 4
STEPS_AN_EPOCH = 20
MODEL = "quickstart_eval"
QUESTIONS = ("Describe this image in detail.", "What is at the top?", "How many objects are there?")
BECOME_SUBREAPER = 36  # of prctl: orphans of those who are killed become children of this process
# The next line of one; not that of a loader's worker whose process was killed while it handed a batch over.
TRACEBACK = re.compile(r'Traceback \(most recent call last\):\n(?!.*/multiprocessing/resource_sharer\.py")(.*)')
FRAYED = b"\xff\xd8\xff no picture"


class Verdict(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    asked: str
    is_good: bool


# ---- what a process holds -------------------------------------------------------------------------------------------


@dataclass
class Held:
    """By a process at one moment; the last number counts its children too."""

    mib: float
    files: int
    threads: int
    processes: int


@dataclass
class Watched:
    """A process that is to hold no more at the end than when it had warmed up."""

    name: str
    process: psutil.Process
    rows: list[Held] = field(default_factory=list)

    def look(self) -> None:
        """Takes a row; a process that ends meanwhile gives none."""
        try:
            memory, processes = self.process.memory_full_info().uss, 1 + len(self.process.children(recursive=True))
            self.rows.append(Held(memory / 2**20, self.process.num_fds(), self.process.num_threads(), processes))
        except psutil.Error:
            return

    def verdicts(self) -> list[Verdict]:
        """The least it held in the second quarter of its time, against the least in the last.

        What comes and goes, as a validation's workers, moves the most that is held and not the least; a leak moves
        both.
        """
        quarter = len(self.rows) // 4
        if not quarter:
            return [Verdict(f"{self.name}: watched", f"{len(self.rows)} times", "4 times", False)]
        early, late = (
            [min(column) for column in zip(*map(astuple, rows), strict=True)]
            for rows in (self.rows[quarter : 2 * quarter], self.rows[-quarter:])
        )
        # Room for a loader's worker and a few connections, should they always be there when this looks.
        rooms = (1.05 * early[0] + 8, early[1] + 8, early[2] + 4, early[3] + 2)
        return [
            Verdict(f"{self.name}: {what}", f"{a:.0f} to {b:.0f}", f"at most {room:.0f}", b <= room)
            for what, a, b, room in zip(("MiB", "open files", "threads", "processes"), early, late, rooms, strict=True)
        ]


# ---- training -------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Shards to train from, in which each twelfth picture is damaged, and one to validate with."""
    from quickstart import scenes

    scenes.write_shards(folder / "clean", num_shards=4, scenes_per_shard=60, seed=1)
    scenes.write_shards(folder / "val", num_shards=1, scenes_per_shard=12, seed=2)
    (folder / "train").mkdir()
    for shard in sorted((folder / "clean").glob("*.tar")):
        with tarfile.open(shard) as source, tarfile.open(folder / "train" / shard.name, "w") as target:
            for number, member in enumerate(source):
                content = source.extractfile(member).read()
                if member.name.endswith(".jpg") and number // 3 % 12 == 5:
                    content = FRAYED
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))


def train_command(data: Path, output_dir: Path) -> list[str]:
    build_info = {"storage": f"{data}/train/*.tar", "val_storage": f"{data}/val/*.tar", "shuffle_buffer": 30}
    run = {
        "max_epoch": 100_000,  # it ends when it is told to
        "iters_per_epoch": STEPS_AN_EPOCH,
        "batch_size_train": BATCH,
        "num_workers": 1,
        "log_freq": 5,
        "save_every_iters": 7,
        "keep_last": 2,
        "resume": "auto",
        "valid_splits": "[val]",
        "device": "cpu",
        "output_dir": output_dir,
    }
    options = [f"datasets.cc_sbu.build_info.{key}={value}" for key, value in build_info.items()]
    options += [f"run.{key}={value}" for key, value in run.items()]
    return ["--cfg-path", "train_configs/quickstart_stage1.yaml", "--options", *options]


def keep_ledger(path: Path) -> None:
    """Lets this process write a line for each step, with its loss and samples, and for what each epoch skipped."""
    from minigpt4.runners import RunnerBase
    from minigpt4.runners.progress import EpochProgress

    train_step, finish = RunnerBase.train_step, EpochProgress.finish

    def write(entry: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def step_and_write(self: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        output = train_step(self, batch, *args, **kwargs)
        texts = hashlib.sha256("\0".join(batch["text_input"]).encode()).hexdigest()[:16]
        count = len(batch["text_input"])
        write({"step": self.state.step, "entry": [output["loss"].item().hex(), texts, count]})
        return output

    def finish_and_write(self: Any) -> dict[str, float]:
        stats = finish(self)
        skipped = {name: dict(counts) for name, counts in self.skipped.items()}
        write({"step": f"epoch {self.epoch}", "entry": [skipped, stats["train_loss"]]})
        return stats

    RunnerBase.train_step, EpochProgress.finish = step_and_write, finish_and_write


def read_ledger(lines: Iterable[str]) -> dict[Any, list[Any]]:
    """Step or epoch -> all different things that were written of it."""
    ledger: dict[Any, list[Any]] = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        if row["entry"] not in ledger[row["step"]]:
            ledger[row["step"]].append(row["entry"])
    return ledger


def compare_ledgers(whole: dict[Any, list[Any]], broken: dict[Any, list[Any]]) -> list[Verdict]:
    """Whether the run that was killed saw the samples of the undisturbed one, each step's, with its losses."""
    steps = [{key for key in ledger if isinstance(key, int)} for ledger in (whole, broken)]
    last = min(max(keys, default=-1) for keys in steps)
    wrong = [step for step in range(last + 1) if len(whole[step]) != 1 or whole[step] != broken[step]]
    epochs = [key for key in whole if not isinstance(key, int) and key in broken]
    wrong_epochs = [key for key in epochs if len(whole[key]) != 1 or whole[key] != broken[key]]
    skipped = sum(sum(counts.values()) for key in epochs for counts in whole[key][0][0].values())
    return [
        Verdict(
            f"samples lost, doubled or with another loss in {last + 1} steps of both runs",
            f"{BATCH * len(wrong)} of {BATCH * (last + 1)}",
            "0, of more than 0",
            not wrong and last >= 0,
        ),
        Verdict(
            f"epochs with another mean loss or other counts of skipped samples ({skipped} skipped)",
            f"{len(wrong_epochs)} of {len(epochs)}",
            "0, of more than 0",
            not wrong_epochs and len(epochs) > 0 and skipped > 0,
        ),
    ]


class Restarted:
    """A run that is killed or told to stop at random moments, and started again."""

    def __init__(self, command: list[str], folder: Path, rng: Random, seconds: tuple[float, float]) -> None:
        self.command, self.folder, self.rng, self.seconds = command, folder, rng, seconds
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []
        self._start()

    def _start(self) -> None:
        import forked

        self.pid = forked.start(self.command, self.folder / "log", lambda: keep_ledger(self.folder / "ledger"))
        self.until = time.monotonic() + self.rng.uniform(*self.seconds)

    def tick(self) -> None:
        """Ends and restarts the run where its time is up."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.failures.append(f"ended by itself with status {os.waitstatus_to_exitcode(status)}")
            self._start()
        elif time.monotonic() > self.until:
            self.end(signal.SIGTERM if self.rng.random() < 0.3 else signal.SIGKILL)
            self._start()

    def end(self, number: int) -> None:
        """Ends the run by a signal."""
        import forked

        os.kill(self.pid, number)
        status = forked.wait(self.pid)
        self.ends[signal.Signals(number).name] += 1
        # Before a run listens to signals, SIGTERM ends it as it ends any process.
        if status not in (0, -number):
            self.failures.append(f"status {status} after {signal.Signals(number).name}")


# ---- clients --------------------------------------------------------------------------------------------------------


def picture_url(seed: int) -> str:
    from quickstart import scenes

    rng = Random(seed)
    data = scenes.jpeg(scenes.render(scenes.draw_scene(rng), rng))
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def body(number: int, is_stream: bool = False) -> bytes:
    content = [
        {"type": "image_url", "image_url": {"url": picture_url(number)}},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    asked = {"model": MODEL, "max_tokens": 16, "temperature": 0, "stream": is_stream}
    return json.dumps(asked | {"messages": [{"role": "user", "content": content}]}).encode()


def post(port: int, content: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", content)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def text_of(data: bytes) -> str:
    """The answer in a completion or in the events of a stream."""
    if not data.startswith(b"data: "):
        return json.loads(data)["choices"][0]["message"]["content"]
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    if events.pop() != "[DONE]":
        return "a stream that broke off"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def raw_request(content: bytes, length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length + content


class Clients:
    """Threads that ask until a moment, each in its way; they count what they did and note what was wrong."""

    def __init__(self, port: int, expected: Sequence[str], until: float, seed: int) -> None:
        self.port, self.expected, self.until, self.seed = port, expected, until, seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        """Until the moment."""
        ways = [self.good, self.good, self.streaming, self.slow, self.vanishing, self.garbage]
        threads = [threading.Thread(target=self._repeat, args=(way, i)) for i, way in enumerate(ways)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, way: Callable[[Random], str], index: int) -> None:
        rng = Random(self.seed * 100 + index)
        while time.monotonic() < self.until:
            try:
                told = way(rng)
            except Exception as error:
                told = f"wrong: {type(error).__name__}: {error}"
            name = f"{way.__name__}, {told[:60]}"
            self.counts[name] += 1
            if told.startswith("wrong"):
                self.wrong.append(name)
            time.sleep(rng.uniform(0, 0.3))

    def _judge(self, number: int, status: int, data: bytes) -> str:
        if status == 429:
            return "told to come later"
        if status != 200:
            return f"wrong: status {status}"
        return "answered" if text_of(data) == self.expected[number] else f"wrong: {text_of(data)!r}"

    def good(self, rng: Random) -> str:
        number = rng.randrange(len(self.expected))
        return self._judge(number, *post(self.port, body(number)))

    def streaming(self, rng: Random) -> str:
        number = rng.randrange(len(self.expected))
        return self._judge(number, *post(self.port, body(number, is_stream=True)))

    def slow(self, rng: Random) -> str:
        """Sends in a hundred pieces, and reads so."""
        number = rng.randrange(len(self.expected))
        data, answer = raw_request(body(number)), http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        answer.connect()
        with answer.sock as connection:
            for start in range(0, len(data), len(data) // 100 + 1):
                connection.sendall(data[start : start + len(data) // 100 + 1])
                time.sleep(0.02)
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            return self._judge(number, response.status, b"".join(iter(lambda: response.read(7), b"")))

    def vanishing(self, rng: Random) -> str:
        """Leaves in the middle of a request, before the answer, or in the middle of a stream."""
        data = raw_request(body(rng.randrange(len(self.expected)), is_stream=rng.random() < 0.5))
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            if rng.random() < 0.3:
                connection.sendall(data[: rng.randrange(len(data))])
                return "left in the middle of a request"
            connection.sendall(data)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.2))
                return "left before an answer"
            connection.recv(200)
            return "left in the middle of an answer"

    def garbage(self, rng: Random) -> str:
        """Bytes, HTTP or JSON that are none, pictures that are none, a length that is not kept."""
        kind = rng.choice(["bytes", "header", "JSON", "picture", "fields", "length"])
        noise = rng.randbytes(rng.randrange(1, 3000))
        url = "data:image/png;base64," + base64.b64encode(noise).decode()
        shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}]
        picture = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": shown}]}).encode()
        fields = json.dumps({"model": MODEL, "messages": rng.choice([5, [], [None], {"a": 1}])}).encode()
        data = {
            "bytes": noise,
            "header": b"GET / HTTP/1.1\r\n" + b"X: " + noise.hex().encode() * 40 + b"\r\n\r\n",
            "JSON": raw_request(noise),
            "picture": raw_request(picture),
            "fields": raw_request(fields),
            "length": raw_request(noise, 10**12),
        }[kind]
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(100)
            except OSError:  # the server has hung up
                answer = b""
        if answer and not answer.startswith(b"HTTP/1.1 4"):
            return f"wrong: {kind} was answered with {answer[:30]!r}"
        return f"refused ({kind})"


def start_clients(port: int, expected: Sequence[str], until: float, seed: int, told: Path) -> int:
    """In a process of their own, which writes at its end what they say; returns its pid."""
    if pid := os.fork():
        return pid
    clients = Clients(port, expected, until, seed)
    clients.run()
    told.write_text(json.dumps([clients.counts, clients.wrong]), encoding="utf-8")
    os._exit(0)


class Server:
    """demo.py --api."""

    def __init__(self, folder: Path, port: int) -> None:
        self.log, self.port = folder / "server.log", port
        options = ["--cfg-path", f"eval_configs/{MODEL}.yaml", "--options", "model.ckpt=null", "run.device=cpu"]
        command = [sys.executable, "demo.py", *options, "--api", "--port", str(port), "--batch-size", "4"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def answers(self) -> list[str]:
        """What it says to each question, asked one after the other; waits until it serves."""
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            try:
                return [text_of(post(self.port, body(number))[1]) for number in range(6)]
            except ConnectionError:
                time.sleep(0.2)


# ---- all together ---------------------------------------------------------------------------------------------------


def soak(seconds: float, seed: int, folder: Path) -> tuple[list[Verdict], dict[str, Any]]:
    """Runs for a while, in a folder; returns the table and what was done."""
    import forked

    ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
    temporary = folder / "tmp"
    temporary.mkdir()
    shared_before = set(os.listdir("/dev/shm"))
    os.environ.update(TMPDIR=str(temporary), OMP_NUM_THREADS="1")
    tempfile.tempdir = None  # it was looked up before
    write_data(folder / "data")
    server, rng = Server(folder, forked.free_port()), Random(seed)
    expected = server.answers()
    begin = time.monotonic()
    told = folder / "clients.json"
    clients = start_clients(server.port, expected, begin + seconds, seed, told)
    for name in ("whole", "broken"):
        (folder / name).mkdir()
    ledger = folder / "whole" / "ledger"
    whole = forked.start(
        train_command(folder / "data", folder / "whole/out"), folder / "whole/log", lambda: keep_ledger(ledger)
    )
    moments = (seconds / 30, seconds / 8) if seconds < 240 else (3.0, 30.0)
    broken = Restarted(train_command(folder / "data", folder / "broken/out"), folder / "broken", rng, moments)
    watched = [Watched("server", psutil.Process(server.process.pid)), Watched("run", psutil.Process(whole))]
    next_look, between = begin, min(5.0, seconds / 80)
    while time.monotonic() < begin + seconds:
        time.sleep(min(0.25, between / 2))
        broken.tick()
        if time.monotonic() >= next_look:
            next_look += between
            for process in watched:
                process.look()
    is_whole_alive = os.waitpid(whole, os.WNOHANG)[0] == 0
    os.kill(whole, signal.SIGTERM)
    whole_status = forked.wait(whole) if is_whole_alive else "gone before its time"
    broken.end(signal.SIGTERM)
    clients_status = forked.wait(clients)
    counts, wrong = json.loads(told.read_text(encoding="utf-8"))
    afterwards = server.answers()
    server.process.send_signal(signal.SIGINT)
    server_status = server.process.wait(60)
    left = _left_behind()
    shared = sorted(set(os.listdir("/dev/shm")) - shared_before)
    texts = [path.read_text(errors="replace") for path in (server.log, folder / "whole/log", folder / "broken/log")]
    halves = [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]
    checkpoints = list((folder / "whole/out").rglob("checkpoint_*.pth"))
    good = sum(count for name, count in counts.items() if name.endswith(", answered"))
    verdicts = [
        *compare_ledgers(*(read_ledger((folder / name / "ledger").open()) for name in ("whole", "broken"))),
        *(verdict for process in watched for verdict in process.verdicts()),
        _none("restarts that failed", broken.failures),
        _none("answers that were wrong", wrong),
        Verdict("answers that were right", str(good), "more than 0", good > 0),
        Verdict("the server's answers afterwards", "", "as before", afterwards == expected),
        Verdict(
            "status of run, clients and server at the end",
            f"{whole_status}, {clients_status}, {server_status}",
            "0, 0, 0 or 130",
            (whole_status, clients_status) == (0, 0) and server_status in (0, 130),
        ),
        _none("processes left", left),
        _none("temporary files left", os.listdir(temporary)),
        _none("shared memory left", shared),
        _none("half-written files left", halves),
        Verdict("checkpoints of the run", str(len(checkpoints)), "3 (2 and the best)", len(checkpoints) == 3),
        _none("tracebacks in logs", [where for text in texts for where in TRACEBACK.findall(text)]),
    ]
    done = {
        "seconds": round(time.monotonic() - begin),
        "ends of the broken run": dict(broken.ends),
        "requests": dict(sorted(counts.items())),
        "times looked at": [len(process.rows) for process in watched],
    }
    return verdicts, done


def _none(what: str, found: Sequence[str]) -> Verdict:
    told = "; ".join(f"{count} × {name}" for name, count in Counter(found).most_common(3))
    return Verdict(what, f"{len(found)}: {told}" if found else "0", "0", not found)


def _left_behind() -> list[str]:
    """Processes that those who were killed have left, after they had time to notice."""
    deadline = time.monotonic() + 15
    while True:
        while (children := psutil.Process().children()) and os.waitpid(-1, os.WNOHANG)[0]:
            pass
        if not children or time.monotonic() > deadline:
            return [" ".join(child.cmdline())[:80] for child in children]
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes, too")
    parser.add_argument("--keep", action="store_true", help="keep the folder, with logs and checkpoints")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    verdicts, done = soak(60 * args.minutes, args.seed, folder)
    print("| | found | asked | |\n|---|---|---|---|")
    for verdict in verdicts:
        print(f"| {verdict.what} | {verdict.found} | {verdict.asked} | {'good' if verdict.is_good else 'BAD'} |")
    print(json.dumps(done, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"verdicts": verdicts, "done": done}, indent=1), encoding="utf-8")
    if args.keep:
        print(folder)
    else:
        shutil.rmtree(folder)
    return int(not all(verdict.is_good for verdict in verdicts))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())

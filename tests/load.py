"""A long mixed load on the API, and a table of what it leaves behind.

    python -m tests.load --minutes 45 --clients 16

The clients ask with images, chat over several turns, stream, stop in the middle of answers, are slow, vanish or send
garbage. Answers with the same request and seed have to be the same, whatever is answered beside them. Linux only.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

if __name__ == "__main__":  # python -m tests.load
    sys.path.insert(0, str(Path(__file__).parent))

from soak_clients import Server, start_clients
from soak_processes import Verdict, Watched, expect_none


def main() -> int:
    """Runs the load and prints a table; the exit status is 1 if a line is bad."""
    import forked

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="load-"))
    server = Server(folder, forked.free_port())
    expected = server.answers()
    seconds = 60 * args.minutes
    watched, until = Watched("server", psutil.Process(server.process.pid), seconds=seconds), time.monotonic() + seconds
    clients = start_clients(server.port, expected, until, args.seed, folder / "report.json", args.clients)
    while time.monotonic() < until:
        watched.sample()
        time.sleep(min(5.0, seconds / 40))
    status = forked.wait(clients)
    counts, wrong = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    afterwards = server.answers()
    server.process.send_signal(signal.SIGTERM)
    server_status = server.process.wait(60)
    tracebacks = [line for line in server.log.read_text(errors="replace").splitlines() if "Traceback" in line]
    num_answered = sum(count for name, count in counts.items() if name.endswith(", answered"))
    verdicts = [
        *watched.verdicts(),
        expect_none("answers that were wrong", wrong),
        expect_none("tracebacks in the log", tracebacks),
        Verdict("answers that were right", str(num_answered), "more than 0", num_answered > 0),
        Verdict("the server's answers afterwards", "", "as before", afterwards == expected),
        Verdict("status of clients and server", f"{status}, {server_status}", "0, 0", status == server_status == 0),
    ]
    print("| | actual | expected | |\n|---|---|---|---|")
    for verdict in verdicts:
        print(f"| {verdict.what} | {verdict.actual} | {verdict.expected} | {'good' if verdict.is_good else 'BAD'} |")
    print(json.dumps(counts, indent=1, sort_keys=True))
    eighths = [watched.rows[i * len(watched.rows) // 8] for i in range(8)]
    print("MiB of the server over time:", ", ".join(f"{usage.mib:.0f}" for usage in (*eighths, watched.rows[-1])))
    is_good = all(verdict.is_good for verdict in verdicts)
    if is_good:
        shutil.rmtree(folder)
    else:
        print(f"Logs are in {folder}.")
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())

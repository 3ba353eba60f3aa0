r"""Starts several workers of one command on this machine, like a cluster.

    python -m examples.launch --workers=2 -- \
        examples.digits.train --strategy=multiworker --model_dir=out/digits

The arguments after `--` are a module, or a script that ends in .py, and its
arguments. Each worker finds the addresses of the others in TF_CONFIG. Each
start uses new ports. Every line that worker 1 prints begins with "[1] ". A
progress bar that returns to the start of its line prints a line each time.

If a worker fails, the launcher sends SIGTERM to the others. A worker that waits
for a lost worker does not react to it, so the launcher sends SIGKILL after
`--grace_seconds`. Then it restarts all workers, up to `--max_restarts` times.
Workers that save checkpoints resume from them. The exit code is that of the
worker that failed first, 128 + n if signal n ended it, and 0 if none failed.

The launcher passes SIGTERM and SIGINT on to the workers, waits for them to save
a checkpoint, and does not restart them. A second signal kills them. Each worker
has its own process group, which is killed when the worker ends. If the launcher
is killed, its workers end at once on Linux, and when they next print elsewhere.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

GRACE_SECONDS = 10.0

# A process runs this before it becomes a worker, which inherits the setting.
# PR_SET_PDEATHSIG is 1. In preexec_fn it would be unsafe next to threads.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_output = threading.Lock()


class Ended(NamedTuple):
    """A worker that ended, with its exit code: -n if signal n ended it."""

    index: int
    code: int

    def __str__(self):
        if self.code < 0:
            return f"worker {self.index} was ended by {_named(-self.code)}"
        return f"worker {self.index} ended with exit code {self.code}"


def free_ports(count):
    """Returns a list of `count` ports that no process listens on."""
    with contextlib.ExitStack() as stack:
        # All are open at the same time, so no port is returned twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def launch(command, *, workers, max_restarts=0, grace_seconds=GRACE_SECONDS):
    """Runs the workers until all have ended, and restarts them if one failed.

    Installs handlers of SIGINT and SIGTERM, so the main thread must call it.

    Args:
        command: list of str, a module or a script and its arguments.
        workers: int >= 1.
        max_restarts: int >= 0, maximum number of restarts.
        grace_seconds: number >= 0, time between SIGTERM and SIGKILL.

    Returns:
        Int, the exit code.
    """
    events = queue.SimpleQueue()  # Its `put` is safe in a signal handler.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: events.put(number))
    for restart in range(1, max_restarts + 2):
        failed, stopped = _run(command, workers, grace_seconds, events)
        if failed is None:
            return 0
        if stopped or restart > max_restarts:
            break
        _say(f"{failed}; restarting all, {restart} of {max_restarts}")
    _say(failed)
    return failed.code if failed.code > 0 else 128 - failed.code


def _run(command, workers, grace_seconds, events):
    """Returns the first failed `Ended` or None, and whether a signal came."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    running = {}
    failed, stopped, deadline = None, False, None
    try:
        for index in range(workers):
            running[index] = _start(command, index, addresses, events)
        while running:
            event = _next(events, deadline)
            if isinstance(event, Ended):
                del running[event.index]
                if event.code and failed is None:
                    failed = event
                    if running and not stopped:
                        _say(f"{failed}; stopping the others")
                        _send(signal.SIGTERM, running.values())
                        deadline = time.monotonic() + grace_seconds
            elif event is None or stopped or failed:
                _send(signal.SIGKILL, running.values())
                deadline = None
            else:
                _say(f"passing on {_named(event)}")
                _send(event, running.values())
            stopped = stopped or isinstance(event, int)
    finally:
        _send(signal.SIGKILL, running.values())
    return failed, stopped


def _next(events, deadline):
    """Returns an `Ended`, a signal's number, or None after the deadline."""
    if deadline is None:
        return events.get()
    try:
        return events.get(timeout=max(deadline - time.monotonic(), 0))
    except queue.Empty:
        return None


def _start(command, index, addresses, events):
    """Returns the process of a new worker, whose end will be an event."""
    cluster = {"worker": addresses}
    task = {"type": "worker", "index": index}
    words = command if command[0].endswith(".py") else ["-m", *command]
    words = [sys.executable, *words]
    if sys.platform == "linux":
        before = [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT]
        words = [*before, str(os.getpid()), *words]
    process = subprocess.Popen(
        words,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "TF_CONFIG": json.dumps({"cluster": cluster, "task": task}),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # Ctrl-C then reaches the launcher only, which passes it on.
        process_group=0,
    )
    _thread(_follow, process, index, events)
    return process


def _follow(process, index, events):
    """Prints a worker's output until it ends, then puts the event."""
    readers = [
        _thread(_relay, process.stdout, sys.stdout, index),
        _thread(_relay, process.stderr, sys.stderr, index),
    ]
    code = process.wait()
    # Processes that the worker left behind would keep the output open.
    _send(signal.SIGKILL, [process])
    for reader in readers:
        reader.join(GRACE_SECONDS)
    events.put(Ended(index, code))


def _relay(source, target, index):
    # If printing fails, this closes the pipe, so the worker ends too.
    with source:
        for line in source:
            _show(target, f"[{index}] {line}")


def _show(target, line):
    with _output:
        print(line.removesuffix("\n"), file=target, flush=True)


def _say(text):
    _show(sys.stderr, f"launch: {text}")


def _send(number, processes):
    for process in processes:
        # The process may have ended. macOS then raises PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _named(number):
    return f"signal {number} ({signal.strsignal(number)})"


def main(arguments=None):
    """Starts the workers; returns the exit code."""
    parser = argparse.ArgumentParser(
        usage="python -m examples.launch [flags] -- module [arguments]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workers", type=int, default=2, help="number of workers")
    add(
        "--max_restarts",
        type=int,
        default=0,
        help="number of restarts after a worker has failed",
    )
    add(
        "--grace_seconds",
        type=float,
        default=GRACE_SECONDS,
        help="time from SIGTERM to SIGKILL after a worker has failed",
    )
    add("command", nargs="+", metavar="module")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(parser.parse_args(arguments))
    if "--" not in arguments:
        parser.error("-- must come before the module")
    for name, least in (
        ("workers", 1),
        ("max_restarts", 0),
        ("grace_seconds", 0),
    ):
        if not least <= options[name] < float("inf"):
            parser.error(f"--{name} must be {least} or more: {options[name]}")
    # End like other commands when the reader of the output is gone.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")
    return launch(options.pop("command"), **options)


if __name__ == "__main__":
    sys.exit(main())

r"""Starts several workers of one command on this machine, as a cluster would.

    python -m examples.launch --workers=2 -- \
        examples.digits.train --strategy=multiworker --model_dir=out/digits

What follows `--` is a module, or a script that ends in .py, and its arguments.
Each worker finds the others in TF_CONFIG; their ports are chosen anew at each
start. What worker 1 prints begins with "[1] ", line by line; a progress bar
that goes back to the beginning of its line makes a line each time.

If a worker fails, the others get SIGTERM. One that waits for a worker that is
lost does not heed it: SIGKILL follows after `--grace_seconds`. Then all start
again, up to `--max_restarts` times, from their checkpoint if they keep one. The
exit code is that of the worker that failed first, 128 + n where signal n ended
it, and 0 where none failed.

SIGTERM and SIGINT are passed on to the workers, which may take their time to
save a checkpoint, and are not started again. A second signal kills them. Each
worker has a process group of its own, and what it leaves behind there ends with
it. On Linux the workers end with a launcher that is killed; elsewhere each goes
on until it prints.
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

# What a process runs before it becomes a worker, which keeps the setting:
# PR_SET_PDEATHSIG is 1. In preexec_fn, beside threads, it would not be safe.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_output = threading.Lock()


class Ended(NamedTuple):
    """Which worker ended, and its exit code: -n if signal n ended it."""

    index: int
    code: int

    def __str__(self):
        if self.code < 0:
            return f"worker {self.index} was ended by {_named(-self.code)}"
        return f"worker {self.index} ended with exit code {self.code}"


def free_ports(count):
    """Returns a list of `count` ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        # All open at once, lest a port be found twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def launch(command, *, workers, max_restarts=0, grace_seconds=GRACE_SECONDS):
    """Runs the workers until all have ended, and again if one failed.

    Handles SIGINT and SIGTERM from then on; to be called by the main thread.

    Args:
        command: list of str, a module or a script and its arguments.
        workers: int >= 1.
        max_restarts: int >= 0, how often all may be started again.
        grace_seconds: number >= 0, from SIGTERM to SIGKILL.

    Returns:
        Int, the exit code.
    """
    events = queue.SimpleQueue()  # Its `put` may interrupt its `get`.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: events.put(number))
    for restart in range(1, max_restarts + 2):
        failed, stopped = _run(command, workers, grace_seconds, events)
        if failed is None:
            return 0
        if stopped or restart > max_restarts:
            break
        _say(f"{failed}; all start again, {restart} of {max_restarts}")
    _say(failed)
    return failed.code if failed.code > 0 else 128 - failed.code


def _run(command, workers, grace_seconds, events):
    """Returns the first `Ended` that failed, or None; and if a signal came."""
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
                        _say(f"{failed}; the others must end")
                        _send(signal.SIGTERM, running.values())
                        deadline = time.monotonic() + grace_seconds
            elif event is None or stopped or failed:
                _send(signal.SIGKILL, running.values())
                deadline = None
            else:
                _say(f"passes on {_named(event)}")
                _send(event, running.values())
            stopped = stopped or isinstance(event, int)
    finally:
        _send(signal.SIGKILL, running.values())
    return failed, stopped


def _next(events, deadline):
    """Returns an `Ended` or a signal's number; None if the deadline is over."""
    if deadline is None:
        return events.get()
    try:
        return events.get(timeout=max(deadline - time.monotonic(), 0))
    except queue.Empty:
        return None


def _start(command, index, addresses, events):
    """Returns a new worker's process, whose end will be an event."""
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
        # A terminal's Ctrl-C reaches the launcher alone, which passes it on.
        process_group=0,
    )
    _thread(_follow, process, index, events)
    return process


def _follow(process, index, events):
    """Shows a worker's output, then tells of its end."""
    readers = [
        _thread(_relay, process.stdout, sys.stdout, index),
        _thread(_relay, process.stderr, sys.stderr, index),
    ]
    code = process.wait()
    # Else what it left behind would keep the output open.
    _send(signal.SIGKILL, [process])
    for reader in readers:
        reader.join(GRACE_SECONDS)
    events.put(Ended(index, code))


def _relay(source, target, index):
    # Closed if it cannot be shown: the worker then ends too, and is not stuck.
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
        # It may have ended by now; macOS then calls that not permitted.
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
    add("--workers", type=int, default=2, help="how many")
    add("--max_restarts", type=int, default=0, help="after one has failed")
    add(
        "--grace_seconds",
        type=float,
        default=GRACE_SECONDS,
        help="from SIGTERM to SIGKILL, after one has failed",
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
    # As for any command whose output nobody reads any more.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")
    return launch(options.pop("command"), **options)


if __name__ == "__main__":
    sys.exit(main())

"""Child processes that a test signals, kills or gives a full disk.

On Linux a server imports TensorFlow once, which takes four seconds of a
processor, and forks each child. Elsewhere each child is a new interpreter.
Children share nothing with the test but the files they write.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import pathlib
import runpy
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]

# A child trains in about 5 seconds, and longer on a busy machine.
TIMEOUT_SECONDS = 600

_context = multiprocessing.get_context(
    "forkserver" if sys.platform == "linux" else "spawn"
)
_context.set_forkserver_preload(
    ["tensorflow", "keras", "sklearn.datasets", "sklearn.model_selection"]
)


class Child:
    """A running process, made by `started`."""

    def __init__(self, process, output, errors):
        self.pid = process.pid
        self._process = process
        self._output = output
        self._errors = errors

    def output(self):
        """Returns what it has written to stdout."""
        return self._output.read_text()

    def errors(self):
        """Returns what it has written to stderr."""
        return self._errors.read_text()

    def send(self, number):
        """Sends it a signal."""
        os.kill(self.pid, number)

    def finish(self):
        """Returns its exit code, -n if signal n ended it."""
        self._process.join(TIMEOUT_SECONDS)
        code = self._process.exitcode
        assert code is not None, f"It does not end.\n{self.errors()}"
        return code

    def wait_until(self, condition):
        """Waits for a condition. The process must not end before it."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self._process.is_alive(), self.errors()
            assert time.monotonic() < end, self.errors()
            time.sleep(1e-3)


@contextlib.contextmanager
def started(*words, tf_config=None, max_file_bytes=None):
    """Yields a `Child` and kills it when the block ends.

    Args:
        *words: str, a module or a script ending in .py, and its arguments.
        tf_config: dict, the environment variable TF_CONFIG.
        max_file_bytes: int, size that no file it writes may exceed. Writing
            more fails, as it does on a full disk.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = [pathlib.Path(directory, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        process = _context.Process(
            target=_run, args=(words, files, tf_config, max_file_bytes)
        )
        process.start()
        try:
            yield Child(process, *files)
        finally:
            process.kill()
            process.join()


@contextlib.contextmanager
def cluster(*words, count=2, last_max_file_bytes=None):
    """Yields workers, each a `Child`; the first is the chief.

    Args:
        *words: see `started`.
        count: int, the workers.
        last_max_file_bytes: `max_file_bytes` of the worker that is not chief.
    """
    # Not at the top: a child that runs the launcher imports it itself.
    from examples import launch

    addresses = [f"127.0.0.1:{port}" for port in launch.free_ports(count)]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    *words,
                    tf_config={
                        "cluster": {"worker": addresses},
                        "task": {"type": "worker", "index": index},
                    },
                    max_file_bytes=limit,
                )
            )
            for index, limit in enumerate(
                [*[None] * (count - 1), last_max_file_bytes]
            )
        ]


def results(processes):
    """Returns the JSON object in the last line of each child that succeeds."""
    for child in processes:
        assert child.finish() == 0, child.errors()
    return [json.loads(child.output().splitlines()[-1]) for child in processes]


def _run(words, files, tf_config, max_file_bytes):
    """Runs a module or a script in a child."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    # For the interpreters that the child starts.
    os.environ["PYTHONPATH"] = str(ROOT)
    if tf_config:
        os.environ["TF_CONFIG"] = json.dumps(tf_config)
    if max_file_bytes:
        import resource

        limits = (max_file_bytes, max_file_bytes)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sys.argv = list(map(str, words))
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def once(tmp_path_factory, name, make):
    """Returns a directory and what `make(directory)` returned, made once.

    pytest's processes share both: the first makes them, the others wait.

    Args:
        tmp_path_factory: pytest's fixture.
        name: str, of the directory.
        make: function of the directory; JSON can hold its result.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory, result = root / name, root / f"{name}.json"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            result.write_text(json.dumps(make(directory)))
    return directory, json.loads(result.read_text())

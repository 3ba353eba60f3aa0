"""The launcher, with workers of a few lines each."""

import fcntl
import io
import json
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from examples import launch
from tests.processes import children

# Longer than a launcher takes on a busy machine, shorter than `sleep`.
TIMEOUT_SECONDS = 120

# Every worker script begins with this. Workers wait for one another's files.
PREAMBLE = """
import json, os, pathlib, signal, subprocess, sys, time
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
os.chdir(pathlib.Path(__file__).parent)

def touch(name):
    pathlib.Path(name).touch()

def wait(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)

def sleep():
    time.sleep(300)
"""


class Launcher:
    """A launcher of workers that run a script."""

    def __init__(
        self, directory, worker, *flags, command=None, stdout=None, **variables
    ):
        script = directory / "worker.py"
        script.write_text(PREAMBLE + textwrap.dedent(worker))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "examples.launch", *flags, "--"),
                *(command or [str(script)]),
            ],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(children.ROOT), **variables},
            # Workers inherit stdin, which must not be pytest's.
            stdin=subprocess.PIPE,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read(self, count):
        """Returns the first lines of its output, sorted."""
        return sorted(self.process.stdout.readline() for _ in range(count))

    def finish(self):
        """Returns exit code, lines of output and lines of errors."""
        try:
            output, errors = self.process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            self.process.kill()
        lines = [(text or "").split("\n") for text in (output, errors)]
        return self.process.returncode, *lines


def of_worker(lines, index):
    prefix = f"[{index}] "
    return [line[len(prefix) :] for line in lines if line.startswith(prefix)]


def test_lines_begin_with_their_workers_number(tmp_path):
    worker = r"""
    sys.stdout.write("first\n\n  bar 1\r  bar 2\r\nlast of them")
    sys.stderr.write("wrong\nlast wrong")
    """
    code, output, errors = Launcher(tmp_path, worker, "--workers=3").finish()
    assert code == 0
    lines = ["first", "", "  bar 1", "  bar 2", "last of them"]
    assert len(output) == 3 * len(lines) + 1
    for index in range(3):
        assert of_worker(output, index) == lines
        assert of_worker(errors, index) == ["wrong", "last wrong"]


def test_lines_come_while_the_worker_runs_and_are_never_mixed(tmp_path):
    worker = r"""
    print("begins")
    wait("read")
    for _ in range(100):
        for piece in ("abc" * 1000, "def" * 1000, "\n"):
            os.write(1, piece.encode())
    os.write(1, b"long" * 2**18)
    """
    launcher = Launcher(tmp_path, worker)
    assert launcher.read(2) == ["[0] begins\n", "[1] begins\n"]
    (tmp_path / "read").touch()
    code, output, _ = launcher.finish()
    assert code == 0
    expected = ["abc" * 1000 + "def" * 1000] * 100 + ["long" * 2**18]
    assert of_worker(output, 0) == of_worker(output, 1) == expected
    assert len(output) == 2 * len(expected) + 1


def test_two_threads_do_not_mix_their_lines():
    class Target(io.StringIO):
        def write(self, text):
            time.sleep(0.01)  # Lets the other thread interrupt.
            return super().write(text)

    target = Target()
    threads = [
        threading.Thread(target=launch._show, args=(target, name))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(target.getvalue().splitlines()) == ["a", "b"]


def test_a_module_gets_its_arguments_and_may_print_any_bytes(tmp_path):
    # A byte that is not UTF-8, and a character that is not ASCII.
    worker = r"""
    os.write(1, b"\xff \xe2\x94\x81\n")
    print(__name__, sys.argv[1:])
    """
    code, output, _ = Launcher(
        tmp_path,
        worker,
        "--workers=1",
        command=["worker", "--workers=7", "--", "x y"],
        PYTHONIOENCODING="ascii",
    ).finish()
    assert code == 0
    assert output == [
        r"[0] \ufffd \u2501",
        "[0] __main__ ['--workers=7', '--', 'x y']",
        "",
    ]


def test_each_worker_knows_the_cluster_and_its_ports_are_new(tmp_path):
    # Worker 2 fails in the first of two rounds.
    worker = """
    print(json.dumps({
        "config": json.loads(os.environ["TF_CONFIG"]),
        "kept": os.environ["KEPT"],
        "unbuffered": os.environ["PYTHONUNBUFFERED"],
        "group": os.getpgrp() == os.getpid(),
        "input": os.path.samestat(os.fstat(0), os.stat(os.devnull)),
    }))
    touch(f"printed {index}")
    for other in range(3):
        wait(f"printed {other}")
    if index == 2 and not pathlib.Path("failed").exists():
        touch("failed")
        sys.exit(75)
    """
    code, output, _ = Launcher(
        tmp_path, worker, "--workers=3", "--max_restarts=1", KEPT="kept"
    ).finish()
    assert code == 0
    clusters = []
    for index in range(3):
        rounds = [json.loads(line) for line in of_worker(output, index)]
        clusters.append([each["config"].pop("cluster") for each in rounds])
        task = {"task": {"type": "worker", "index": index}}
        others = {"unbuffered": "1", "group": True, "input": True}
        assert rounds == [{"config": task, "kept": "kept", **others}] * 2
    first, second = clusters[0]
    assert clusters == [[first, second]] * 3
    assert first != second
    for cluster in (first, second):
        (addresses,) = cluster.values()
        assert list(cluster) == ["worker"]
        assert {each.partition(":")[0] for each in addresses} == {"127.0.0.1"}
        assert len(set(addresses)) == 3


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGKILL, "signal 9 (Killed)"),
        (signal.SIGRTMIN + 1, f"signal {signal.SIGRTMIN + 1} ("),
    ],
)
def test_a_worker_that_a_signal_ended(tmp_path, number, name):
    worker = f"""
    if index == 1:
        os.kill(os.getpid(), {int(number)})
    """
    code, _, errors = Launcher(tmp_path, worker).finish()
    assert code == 128 + number
    assert errors[-2].startswith(f"launch: worker 1 was ended by {name}")


def test_a_worker_that_is_done_leaves_the_others_alone(tmp_path):
    worker = """
    if index == 1:
        pathlib.Path("pid").write_text(str(os.getpid()))
        touch("written")
    else:
        wait("written")
        pid = int(pathlib.Path("pid").read_text())
        try:
            while True:  # Until the launcher has noted the end.
                os.kill(pid, 0)
                time.sleep(0.01)
        except ProcessLookupError:
            time.sleep(0.2)
            print("done too")
    """
    code, output, errors = Launcher(
        tmp_path, worker, "--grace_seconds=0"
    ).finish()
    assert code == 0
    assert output == ["[0] done too", ""]
    assert errors == [""]


def test_the_first_that_fails_stops_the_others_and_gives_the_code(tmp_path):
    # The others exit with 75 on SIGTERM.
    worker = """
    def told(number, frame):
        print("told", number)
        sys.exit(75)

    signal.signal(signal.SIGTERM, told)
    touch(f"ready {index}")
    wait("ready 0")
    wait("ready 2")
    if index == 1:
        sys.exit(5)
    sleep()
    """
    code, output, errors = Launcher(tmp_path, worker, "--workers=3").finish()
    assert code == 5
    assert sorted(output) == ["", "[0] told 15", "[2] told 15"]
    assert errors == [
        "launch: worker 1 ended with exit code 5; stopping the others",
        "launch: worker 1 ended with exit code 5",
        "",
    ]


# A lock that is released when all processes with the open file have ended.
HOLDS = """
import fcntl
held = open(f"held {index}", "w")
fcntl.flock(held, fcntl.LOCK_EX)
"""


def wait_for_the_end(directory):
    begin = time.monotonic()
    for index in range(2):
        with open(directory / f"held {index}") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - begin < TIMEOUT_SECONDS


def test_who_ignores_sigterm_is_killed_with_what_it_started(tmp_path):
    worker = f"""{HOLDS}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(300)"],
    pass_fds=[held.fileno()],
)
touch(f"ready {{index}}")
wait(f"ready {{1 - index}}")
if index == 1:
    sys.exit(5)
sleep()
"""
    code, *_ = Launcher(tmp_path, worker, "--grace_seconds=0.2").finish()
    assert code == 5
    wait_for_the_end(tmp_path)


def test_a_worker_that_cannot_start_ends_the_others(tmp_path, monkeypatch):
    started = []
    start = launch._start

    def start_one(command, index, addresses, events):
        if started:
            raise OSError("no more processes")
        started.append(start(command, index, addresses, events))
        return started[0]

    monkeypatch.setattr(launch, "_start", start_one)
    script = tmp_path / "worker.py"
    script.write_text("import time; time.sleep(300)")
    with pytest.raises(OSError, match="no more processes"):
        launch._run([str(script)], 2, 10, queue.SimpleQueue())
    assert started[0].wait(TIMEOUT_SECONDS) == -signal.SIGKILL


def test_all_that_a_failing_worker_said_is_shown(tmp_path):
    worker = """
    if index == 1:
        for number in range(5000):
            print(number)
        raise ValueError("the reason")
    sleep()
    """
    code, output, errors = Launcher(tmp_path, worker).finish()
    assert code == 1
    assert of_worker(output, 1) == [str(number) for number in range(5000)]
    said = of_worker(errors, 1)
    assert said[0].startswith("Traceback")
    assert said[-1] == "ValueError: the reason"


@pytest.mark.parametrize(("max_restarts", "code"), [(2, 0), (1, 75)])
def test_all_restart_as_often_as_is_allowed(tmp_path, max_restarts, code):
    worker = """
    past = pathlib.Path(f"starts {index}")
    starts = 1 + (int(past.read_text()) if past.exists() else 0)
    past.write_text(str(starts))
    print("start", starts)
    touch(f"started {index} {starts}")
    wait(f"started {1 - index} {starts}")
    if starts < 3:
        sys.exit(75) if index == 1 else sleep()
    """
    received, output, errors = Launcher(
        tmp_path, worker, f"--max_restarts={max_restarts}"
    ).finish()
    assert received == code
    starts = [f"start {1 + number}" for number in range(1 + max_restarts)]
    assert of_worker(output, 0) == of_worker(output, 1) == starts
    assert [line for line in errors if "restarting" in line] == [
        "launch: worker 1 ended with exit code 75; restarting all, "
        f"{1 + number} of {max_restarts}"
        for number in range(max_restarts)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path, number):
    # Worker 1 ends at once, worker 0 takes longer than the grace.
    worker = """
    def told(number, frame):
        print("told", number)
        if index == 0:
            wait("ended")
            time.sleep(0.5)
            print("saved")
        sys.exit(75)

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
    print("ready")
    sleep()
    """
    launcher = Launcher(
        tmp_path, worker, "--grace_seconds=0.1", "--max_restarts=3"
    )
    launcher.read(2)
    launcher.process.send_signal(number)
    assert launcher.read(2) == [f"[{i}] told {number:d}\n" for i in range(2)]
    (tmp_path / "ended").touch()
    code, output, errors = launcher.finish()
    assert code == 75
    assert output == ["[0] saved", ""]
    assert errors == [
        f"launch: passing on signal {number:d} ({signal.strsignal(number)})",
        "launch: worker 1 ended with exit code 75",
        "",
    ]


def test_a_second_signal_kills(tmp_path):
    worker = """
    signal.signal(signal.SIGTERM, lambda number, frame: print("told"))
    print("ready")
    while True:
        sleep()
    """
    launcher = Launcher(tmp_path, worker, "--max_restarts=3")
    launcher.read(2)
    launcher.process.terminate()
    assert launcher.read(2) == ["[0] told\n", "[1] told\n"]
    launcher.process.terminate()
    code, *_ = launcher.finish()
    assert code == 128 + 9


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path):
    launcher = Launcher(tmp_path, HOLDS + "print('ready'); sleep()")
    launcher.read(2)
    launcher.process.kill()
    launcher.finish()
    wait_for_the_end(tmp_path)


ENDLESS = """
while True:
    print("x" * 1000)
"""


def test_output_that_nobody_reads_ends_all(tmp_path):
    with Launcher(tmp_path, ENDLESS).process as process:
        process.stdout.close()
        assert process.wait(TIMEOUT_SECONDS) == -signal.SIGPIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_ends_all(tmp_path):
    with open("/dev/full", "w") as full:
        code, _, errors = Launcher(tmp_path, ENDLESS, stdout=full).finish()
    assert code > 0
    assert any("No space left on device" in line for line in errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: module"),
        (["--workers=2", "--"], "required: module"),
        (["module"], "-- must come before the module"),
        (["module", "--seed=1"], "unrecognized arguments: --seed=1"),
        (["--workers=0", "--", "module"], "--workers must be 1 or more: 0"),
        (["--workers=two", "--", "module"], "invalid int value: 'two'"),
        (["--max_restarts=-1", "--", "m"], "--max_restarts must be 0 or more"),
        (["--grace_seconds=nan", "--", "m"], "--grace_seconds must be 0"),
    ],
)
def test_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        launch.main(arguments)
    assert error.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "[flags] -- module [arguments]" in errors

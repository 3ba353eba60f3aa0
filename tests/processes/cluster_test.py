"""The files of examples/cluster/, with stubs for the cluster's commands."""

import json
import os
import pathlib
import re
import socket
import stat
import subprocess
import sys
import textwrap

import pytest
import yaml
from absl import flags as absl_flags

from examples.common import runs, training
from examples.digits import train
from tests.processes import children

CLUSTER = children.ROOT / "examples" / "cluster"


def run(words, commands, **variables):
    """Runs a command with stubs for some commands; returns the process.

    Args:
        words: list of str, a command and its arguments.
        commands: dict from the name of a command to its Python code.
        **variables: str, environment variables, of which PATH is a directory
            for the stubs.
    """
    directory = pathlib.Path(variables.pop("PATH"))
    directory.mkdir(exist_ok=True)
    for name, code in commands.items():
        path = directory / name
        path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(code))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(directory), os.environ["PATH"]])
    return subprocess.run(
        words,
        cwd=children.ROOT,
        env={**os.environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=children.TIMEOUT_SECONDS,
    )


class TestSlurm:
    def batch(self, tmp_path, srun, *arguments, **variables):
        """Runs slurm.sh; returns the process and scontrol's arguments."""
        told = tmp_path / "told"
        scontrol = f"""
            import pathlib, sys
            pathlib.Path({str(told)!r}).write_text(" ".join(sys.argv[1:]))
            """
        process = run(
            ["bash", str(CLUSTER / "slurm.sh"), *arguments],
            {"srun": srun, "scontrol": scontrol},
            PATH=str(tmp_path / "commands"),
            PYTHON=sys.executable,
            **{"SLURM_JOB_ID": "77", **variables},
        )
        return process, told.read_text() if told.exists() else None

    @pytest.mark.parametrize(
        ("code", "restarts", "told"),
        [
            (0, {}, None),
            (1, {}, None),
            (training.STOPPED, {}, "requeue 77"),
            (training.STOPPED, {"SLURM_RESTART_COUNT": "19"}, "requeue 77"),
            (training.STOPPED, {"SLURM_RESTART_COUNT": "20"}, None),
            # SIGKILL: 128 + 9.
            (137, {"SLURM_RESTART_COUNT": "1"}, "requeue 77"),
        ],
    )
    def test_a_stopped_run_is_queued_again(
        self, tmp_path, code, restarts, told
    ):
        process, received = self.batch(tmp_path, f"exit({code})", **restarts)
        assert process.returncode == code, process.stderr
        assert received == told

    def test_workers_are_asked_to_stop_before_the_limit(self):
        text = (CLUSTER / "slurm.sh").read_text()
        options = re.findall(r"^#SBATCH --(\S+)$", text, re.MULTILINE)
        assert {"requeue", "open-mode=append"} <= set(options)
        # B:TERM would signal the batch script only.
        (notice,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", text, re.M)
        # --wait counts from the first worker's end and fits in the notice.
        (patience,) = re.findall(r"^srun .*--wait=(\d+)", text, re.M)
        assert 0 < int(patience) < int(notice)

    @pytest.mark.multiworker
    def test_two_tasks_train(self, tmp_path):
        """Both tasks run on one node, localhost."""
        srun = """
            import os, subprocess, sys

            command = list(sys.argv[1:])
            while command[0].startswith("-"):
                del command[0]
            os.environ.update(
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_NODELIST="localhost",
                SLURM_STEP_TASKS_PER_NODE="2",
                SLURMD_NODENAME="localhost",
            )
            tasks = []
            for rank in "01":
                os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank)
                tasks.append(subprocess.Popen(command))
            sys.exit(max(task.wait() for task in tasks))
            """
        words = ("tests.processes.small_trainer", "--scale=4", "--smoke")
        process, told = self.batch(
            tmp_path,
            srun,
            *words,
            f"--model_dir={tmp_path / 'two'}",
            SLURM_JOB_ID=str(unused_job()),
        )
        assert process.returncode == 0, process.stdout + process.stderr
        assert told is None
        # Only the chief prints the result.
        assert process.stdout.count("digits: Result(") == 1
        # The two tasks train on the same examples as one process.
        with children.started(
            *words, f"--model_dir={tmp_path / 'one'}"
        ) as child:
            assert child.finish() == 0, child.errors()
        two, one = (runs.read(tmp_path / name).log for name in ("two", "one"))
        for column in ("loss", "gain", "scale_invariant_step"):
            assert two[column] == pytest.approx(one[column], rel=1e-5)


def unused_job():
    """Returns the number of a Slurm job whose first two ports are free."""
    for job in range(os.getpid(), os.getpid() + 1024):
        port = 16384 + 16 * (job % 1024)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("", port))
                second.bind(("", port + 1))
            except OSError:
                continue
        return job
    raise OSError("no port is free")


class TestKubernetes:
    @pytest.fixture
    def objects(self):
        """The objects of kubernetes.yaml, by kind."""
        text = (CLUSTER / "kubernetes.yaml").read_text()
        return {each["kind"]: each for each in yaml.safe_load_all(text)}

    @pytest.fixture
    def job(self, objects):
        return objects["Job"]["spec"]

    @pytest.fixture
    def pod(self, job):
        return job["template"]["spec"]

    @pytest.fixture
    def container(self, pod):
        (container,) = pod["containers"]
        return container

    def test_each_pod_trains_with_all_pods(
        self, tmp_path, objects, job, pod, container
    ):
        name = objects["Job"]["metadata"]["name"]
        # A pod of an indexed Job has the Job's name and the index as host name,
        # and as subdomain a Service without an address of its own.
        hosts = [
            f"{name}-{index}.{pod['subdomain']}"
            for index in range(job["completions"])
        ]
        label = "metadata.labels['batch.kubernetes.io/job-name']"
        variables = {
            variable["name"]: variable.get("value")
            or {label: name}[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for variable in container["env"]
        }
        python = """
            import json, os, sys
            print(json.dumps([json.loads(os.environ["TF_CONFIG"]), sys.argv]))
            """
        for index in range(job["completions"]):
            process = run(
                [*container["command"], *container["args"]],
                {"python": python},
                PATH=str(tmp_path),
                JOB_COMPLETION_INDEX=str(index),
                **variables,
            )
            assert process.returncode == 0, process.stderr
            config, (_, *arguments) = json.loads(process.stdout)
            assert config == {
                "cluster": {"worker": [f"{host}:2222" for host in hosts]},
                "task": {"type": "worker", "index": index},
            }
            assert arguments[:2] == ["-m", train.__name__]
            assert arguments[-1] == "--strategy=multiworker"
            for argument in arguments[2:]:
                flag = re.fullmatch(r"--(\w+)=.+", argument)[1]
                assert flag in absl_flags.FLAGS, argument

    def test_all_pods_run_at_once_under_their_names(self, objects, job, pod):
        assert job["completionMode"] == "Indexed"
        assert job["parallelism"] == job["completions"] > 1
        service = objects["Service"]
        assert service["metadata"]["name"] == pod["subdomain"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"]
        # The Job puts this label on its pods.
        assert service["spec"]["selector"] == {
            "batch.kubernetes.io/job-name": objects["Job"]["metadata"]["name"]
        }

    def test_the_runs_are_on_storage_of_all_pods(self, objects, pod, container):
        claim = objects["PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        (volume,) = pod["volumes"]
        named = volume["persistentVolumeClaim"]["claimName"]
        assert named == claim["metadata"]["name"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        flags = dict(word.split("=") for word in container["args"][1:])
        directory = pathlib.Path(flags["--model_dir"])
        assert pathlib.Path(mount["mountPath"]) in directory.parents

    def test_a_pod_that_was_stopped_is_replaced_uncounted(self, job, pod):
        # podFailurePolicy requires it.
        assert pod["restartPolicy"] == "Never"
        rules = job["podFailurePolicy"]["rules"]
        codes = {"operator": "In", "values": [training.STOPPED]}
        assert {"action": "Ignore", "onExitCodes": codes} in rules
        assert job["backoffLimit"] > 0


def test_what_the_image_copies_and_needs_is_there():
    text = (CLUSTER / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    assert copied
    for name in " ".join(copied).split():
        assert (children.ROOT / name).exists(), name
    # setup.py's python_requires.
    version = re.search(r"^FROM python:3\.(\d+)-", text, re.MULTILINE)
    assert int(version[1]) >= 11

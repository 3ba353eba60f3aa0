"""The files of examples/cluster/: what a cluster would run of them is run."""

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

from examples.common import training
from examples.digits import train

ROOT = pathlib.Path(__file__).parent.parent
CLUSTER = ROOT / "examples" / "cluster"
# Two trainers start in some 20 seconds; a machine may be busy.
TIMEOUT_SECONDS = 300


def write_command(directory, name, code):
    """Writes a Python script that stands in for a command."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(code))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def with_commands(directory, **variables):
    """Returns an environment whose commands are first those in a directory."""
    path = os.pathsep.join([str(directory), os.environ["PATH"]])
    return {**os.environ, **variables, "PATH": path}


def assert_flags_are_known(arguments):
    """Checks the flags that a file gives the trainer."""
    assert arguments
    for argument in arguments:
        name = re.fullmatch(r"--(\w+)=.+", argument)[1]
        assert name in absl_flags.FLAGS, argument


class TestSlurm:
    def batch(self, tmp_path, srun, *arguments, **variables):
        """Runs slurm.sh; returns the process and what scontrol was told."""
        commands = tmp_path / "commands"
        requeued = tmp_path / "requeued"
        write_command(commands, "srun", srun)
        write_command(
            commands,
            "scontrol",
            f"""
            import pathlib, sys
            pathlib.Path({str(requeued)!r}).write_text(" ".join(sys.argv[1:]))
            """,
        )
        process = subprocess.run(
            ["bash", str(CLUSTER / "slurm.sh"), *arguments],
            cwd=ROOT,
            env=with_commands(
                commands,
                PYTHON=sys.executable,
                **{"SLURM_JOB_ID": "77", **variables},
            ),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        return process, requeued.read_text() if requeued.exists() else None

    @pytest.mark.parametrize(
        "code, restarts, requeued",
        [
            (0, None, None),
            (1, None, None),
            (training.STOPPED, None, "requeue 77"),
            (training.STOPPED, "19", "requeue 77"),
            (training.STOPPED, "20", None),
            # SIGKILL: 128 + 9.
            (137, "1", "requeue 77"),
            (137, "20", None),
        ],
    )
    def test_what_was_stopped_is_queued_again(
        self, tmp_path, code, restarts, requeued
    ):
        variables = (
            {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
        )
        process, told = self.batch(tmp_path, f"exit({code})", **variables)
        assert process.returncode == code, process.stderr
        assert told == requeued

    def test_workers_are_asked_to_stop_before_the_limit(self):
        text = (CLUSTER / "slurm.sh").read_text()
        options = re.findall(r"^#SBATCH --(\S+)$", text, re.MULTILINE)
        assert {"requeue", "open-mode=append"} <= set(options)
        # Not B:TERM, which only the batch script would get.
        (notice,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", text, re.M)
        # From the first worker's end on, all within the limit.
        (patience,) = re.findall(r"^srun .*--wait=(\d+)", text, re.M)
        assert 0 < int(patience) < int(notice)

    @pytest.mark.multiworker
    def test_two_tasks_train(self, tmp_path):
        """As on one node with two tasks, under the name of this machine."""
        srun = """
            import os, subprocess, sys

            command = list(sys.argv[1:])
            while command[0].startswith("-"):
                del command[0]
            step = {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURMD_NODENAME": "localhost",
            }
            tasks = [
                subprocess.Popen(
                    command,
                    env={
                        **os.environ,
                        **step,
                        "SLURM_PROCID": rank,
                        "SLURM_LOCALID": rank,
                    },
                )
                for rank in "01"
            ]
            sys.exit(max(task.wait() for task in tasks))
            """
        process, requeued = self.batch(
            tmp_path,
            srun,
            "examples.digits.train",
            "--scale=4",
            "--smoke",
            f"--model_dir={tmp_path / 'run'}",
            SLURM_JOB_ID=str(unused_job()),
        )
        assert process.returncode == 0, process.stdout + process.stderr
        assert requeued is None
        # Said by the chief alone.
        assert process.stdout.count("digits: Result(") == 1
        with open(tmp_path / "run" / "result.json") as file:
            result = json.load(file)
        assert result["scale"] == 4
        # tau reaches SMOKE_STEPS = 4, at a gain of 1 to 4 per iteration.
        assert 1 <= result["iterations"] <= training.SMOKE_STEPS


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
        """What kubernetes.yaml makes, by kind."""
        text = (CLUSTER / "kubernetes.yaml").read_text()
        objects = list(yaml.safe_load_all(text))
        return {each["kind"]: each for each in objects}

    @pytest.fixture
    def job(self, objects):
        return objects["Job"]["spec"]

    @pytest.fixture
    def pod(self, job):
        return job["template"]["spec"]

    def start(self, tmp_path, objects, pod, index):
        """Runs a container's command as the pod of an index does.

        Returns what `python` finds in TF_CONFIG, and its arguments.
        """
        container = pod["containers"][0]
        write_command(
            tmp_path,
            "python",
            """
            import json, os, sys
            print(json.dumps([json.loads(os.environ["TF_CONFIG"]), sys.argv]))
            """,
        )
        label = "metadata.labels['batch.kubernetes.io/job-name']"
        variables = {
            variable["name"]: variable.get("value")
            or {label: objects["Job"]["metadata"]["name"]}[
                variable["valueFrom"]["fieldRef"]["fieldPath"]
            ]
            for variable in container["env"]
        }
        process = subprocess.run(
            [*container["command"], *container["args"]],
            env=with_commands(
                tmp_path, JOB_COMPLETION_INDEX=str(index), **variables
            ),
            capture_output=True,
            check=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        config, (_, *arguments) = json.loads(process.stdout)
        return config, arguments

    def test_each_pod_finds_all_pods(self, tmp_path, objects, job, pod):
        name = objects["Job"]["metadata"]["name"]
        # The host name of a pod of an indexed Job is the Job's with the index;
        # the subdomain is that of a Service without an address of its own.
        hosts = [
            f"{name}-{index}.{pod['subdomain']}"
            for index in range(job["completions"])
        ]
        for index in range(job["completions"]):
            config, _ = self.start(tmp_path, objects, pod, index)
            assert config == {
                "cluster": {"worker": [f"{host}:2222" for host in hosts]},
                "task": {"type": "worker", "index": index},
            }

    def test_all_pods_run_at_once_under_their_names(self, objects, job, pod):
        assert job["completionMode"] == "Indexed"
        assert job["parallelism"] == job["completions"] > 1
        service = objects["Service"]
        assert service["metadata"]["name"] == pod["subdomain"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"]
        # Which the Job puts on its pods.
        assert service["spec"]["selector"] == {
            "batch.kubernetes.io/job-name": objects["Job"]["metadata"]["name"]
        }

    def test_the_trainer_and_its_flags_are_known(self, tmp_path, objects, pod):
        _, arguments = self.start(tmp_path, objects, pod, 0)
        assert arguments[:2] == ["-m", train.__name__]
        assert arguments[-1] == "--strategy=multiworker"
        assert_flags_are_known(arguments[2:])

    def test_the_runs_are_on_storage_of_all_pods(self, objects, pod):
        claim = objects["PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        (volume,) = pod["volumes"]
        named = volume["persistentVolumeClaim"]["claimName"]
        assert named == claim["metadata"]["name"]
        container = pod["containers"][0]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        (directory,) = (
            argument.removeprefix("--model_dir=")
            for argument in container["args"]
            if argument.startswith("--model_dir=")
        )
        assert (
            pathlib.Path(mount["mountPath"]) in pathlib.Path(directory).parents
        )

    def test_a_pod_that_was_stopped_is_replaced_uncounted(self, job, pod):
        # Which podFailurePolicy asks for.
        assert pod["restartPolicy"] == "Never"
        (codes,) = (
            rule
            for rule in job["podFailurePolicy"]["rules"]
            if "onExitCodes" in rule
        )
        assert codes == {
            "action": "Ignore",
            "onExitCodes": {"operator": "In", "values": [training.STOPPED]},
        }
        assert job["backoffLimit"] > 0


class TestDockerfile:
    def test_what_it_copies_and_installs_is_there(self):
        text = (CLUSTER / "Dockerfile").read_text()
        copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
        assert copied
        for name in " ".join(copied).split():
            assert (ROOT / name).exists(), name
        # setup.py's python_requires.
        version = re.search(r"^FROM python:3\.(\d+)-", text, re.MULTILINE)
        assert int(version[1]) >= 11

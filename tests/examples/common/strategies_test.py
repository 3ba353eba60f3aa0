"""The strategies of the examples: which workers there are, which is chief."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import tensorflow as tf
from tensorflow.python.distribute import tpu_strategy

from examples import launch
from examples.common import strategies

ROOT = pathlib.Path(__file__).parent.parent
# Both start in some 10 seconds; a machine may be busy.
TIMEOUT_SECONDS = 180

# Prints whether it is chief, and how many workers there are.
WORKER = """
import json
import tensorflow as tf
from examples import strategies

strategy = strategies.make("multiworker")
ones = strategy.run(tf.function(lambda: tf.ones(())))
workers = int(strategy.reduce("SUM", ones, axis=None))
print(json.dumps([strategies.is_chief(strategy), workers]))
"""


class TestCluster:
    def test_unknown_is_refused(self):
        with pytest.raises(
            ValueError,
            match=r"cluster is not known\. Expected one of .*'tf_config', "
            r"'slurm'.*Received: cluster='mesos'",
        ):
            strategies.make("multiworker", cluster="mesos")

    @pytest.mark.parametrize(
        "config", [None, "", "{}", '{"cluster": {"worker": ["n2:8888"]}}']
    )
    def test_no_cluster_is_refused(self, monkeypatch, config):
        monkeypatch.delenv("TF_CONFIG", raising=False)
        if config is not None:
            monkeypatch.setenv("TF_CONFIG", config)
        with pytest.raises(ValueError, match="No cluster is told of") as error:
            strategies.make("multiworker")
        assert "Expected the environment variable TF_CONFIG" in str(error.value)
        assert f"TF_CONFIG={config!r}" in str(error.value)


class TestChief:
    def run(self, cluster):
        """Returns what each task printed, by its name."""
        processes = {
            f"{job}:{index}": subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=ROOT,
                env={
                    **os.environ,
                    "TF_CONFIG": json.dumps(
                        {
                            "cluster": cluster,
                            "task": {"type": job, "index": index},
                        }
                    ),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for job, addresses in cluster.items()
            for index in range(len(addresses))
        }
        try:
            outputs = {
                task: process.communicate(timeout=TIMEOUT_SECONDS)
                for task, process in processes.items()
            }
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for task, process in processes.items():
            assert process.returncode == 0, outputs[task][1][-4000:]
        return {task: json.loads(out) for task, (out, _) in outputs.items()}

    @pytest.mark.multiworker
    def test_is_the_first_of_workers_alone(self):
        first, second = (f"127.0.0.1:{port}" for port in launch.free_ports(2))
        assert self.run({"worker": [first, second]}) == {
            "worker:0": [True, 2],
            "worker:1": [False, 2],
        }

    @pytest.mark.multiworker
    def test_is_not_a_worker_where_there_is_a_chief(self):
        first, second = (f"127.0.0.1:{port}" for port in launch.free_ports(2))
        assert self.run({"chief": [first], "worker": [second]}) == {
            "chief:0": [True, 2],
            "worker:0": [False, 2],
        }

    @pytest.mark.parametrize("replicas", [1, 2])
    def test_is_the_only_process(self, strategy_of, replicas):
        assert strategies.is_chief(strategy_of(replicas))

    def test_is_the_process_that_drives_a_tpu(self):
        # There is none to make the strategy of: the class answers.
        extended = object.__new__(tpu_strategy.TPUExtended)
        assert strategies.is_chief(types.SimpleNamespace(extended=extended))


STEP = {
    "SLURM_JOB_ID": "1025",
    "SLURM_STEP_NUM_TASKS": "4",
    # What Slurm makes of n2 and n10, with two tasks on each.
    "SLURM_STEP_NODELIST": "n[2,10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


class TestSlurm:
    TASKS = (("n2", 0), ("n2", 1), ("n10", 0), ("n10", 1))

    @pytest.fixture(autouse=True)
    def _no_servers(self, monkeypatch):
        """Makes strategies that only hold the resolver they were given."""
        monkeypatch.setattr(
            tf.distribute,
            "MultiWorkerMirroredStrategy",
            lambda resolver: types.SimpleNamespace(
                cluster_resolver=resolver, num_replicas_in_sync=4
            ),
        )

    def resolver(self, monkeypatch, rank, **changes):
        node, local = self.TASKS[rank]
        task = {
            "SLURM_PROCID": str(rank),
            "SLURMD_NODENAME": node,
            "SLURM_LOCALID": str(local),
        }
        for name, value in {**STEP, **task, **changes}.items():
            monkeypatch.setenv(name, value)
        return strategies.make("multiworker", cluster="slurm").cluster_resolver

    def test_each_task_finds_itself_on_its_own_node(self, monkeypatch):
        found = set()
        for rank, (node, local) in enumerate(self.TASKS):
            resolver = self.resolver(monkeypatch, rank)
            assert resolver.task_type == "worker"
            spec = resolver.cluster_spec()
            found.add(resolver.task_id)
            # 16384 + 16 * (1025 % 1024) = 16400
            assert spec.job_tasks("worker") == [
                "n10:16400",
                "n10:16401",
                "n2:16400",
                "n2:16401",
            ]
            own = spec.task_address("worker", resolver.task_id)
            assert own == f"{node}:{16400 + local}"
        assert found == {0, 1, 2, 3}

    def test_jobs_in_succession_share_no_port(self, monkeypatch):
        used = []
        for job in range(2**20, 2**20 + 1024):
            resolver = self.resolver(monkeypatch, 0, SLURM_JOB_ID=str(job))
            workers = resolver.cluster_spec().job_tasks("worker")
            first = int(workers[0].split(":")[1])
            used += range(first, first + 16)
        assert len(set(used)) == 1024 * 16
        # Linux hands out ports from 32768 on, and root's end at 1023.
        assert min(used) > 1023
        assert max(used) < 32768

    @pytest.mark.parametrize("gpus", [0, 1, 8])
    def test_gpus_are_those_that_the_task_sees(self, monkeypatch, gpus):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        monkeypatch.setattr(
            tf.config, "list_physical_devices", lambda kind: [kind] * gpus
        )
        resolver = self.resolver(monkeypatch, 0)
        assert resolver.num_accelerators() == {"GPU": gpus}
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"

    def test_outside_a_step_is_refused(self, monkeypatch):
        for name in os.environ:
            if name.startswith("SLURM"):
                monkeypatch.delenv(name)
        # What a batch script has: it is on a node, and no task of a step.
        monkeypatch.setenv("SLURMD_NODENAME", "n2")
        for name in ("JOB_ID", "PROCID", "LOCALID"):
            monkeypatch.setenv(f"SLURM_{name}", "0")
        with pytest.raises(ValueError, match="no task of a Slurm step") as e:
            strategies.make("multiworker", cluster="slurm")
        assert (
            "Expected `srun` to start it, which sets SLURM_STEP_NUM_TASKS, "
            "SLURM_STEP_NODELIST, SLURM_STEP_TASKS_PER_NODE. "
            "Received: cluster='slurm'" in str(e.value)
        )

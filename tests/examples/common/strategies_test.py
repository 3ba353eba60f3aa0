"""Strategies, clusters, and the scale that replicas and micro-batches make."""

import json
import os
import subprocess
import sys
import types

import pytest
import tensorflow as tf
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    multi_worker_util,
    tpu_strategy,
)

from examples.common import runs, strategies
from tests import harness, sources


class TestSplitScale:
    @pytest.mark.parametrize(
        "given, expected",
        [
            ({"replicas": 1}, (1, 1)),
            ({"replicas": 4}, (4, 1)),
            ({"replicas": 1, "scale": 64}, (64, 64)),
            ({"replicas": 4, "scale": 64}, (64, 16)),
            ({"replicas": 4, "microbatches": 2}, (8, 2)),
            ({"replicas": 4, "scale": 8, "microbatches": 2}, (8, 2)),
        ],
    )
    def test_one_follows_from_the_others(self, given, expected):
        assert strategies.split_scale(**given) == expected

    @pytest.mark.parametrize(
        "given",
        [
            {"replicas": 4, "scale": 6},
            {"replicas": 4, "scale": 2},
            {"replicas": 2, "scale": 8, "microbatches": 2},
        ],
    )
    def test_other_scales_are_refused(self, given):
        with harness.refused(
            "`scale` must be replicas * microbatches",
            f"scale={given['scale']}, replicas={given['replicas']}",
        ):
            strategies.split_scale(**given)


class TestMake:
    def test_one_device_has_one_replica(self):
        with harness.refused(
            "`replicas` must be the number of replicas of the strategy, 1",
            "replicas=2, strategy='default'",
        ):
            strategies.make("default", replicas=2)

    @pytest.mark.parametrize("strategy", ["default", "mirrored"])
    def test_workers_that_would_not_train_together(self, monkeypatch, strategy):
        cluster = {"worker": ["n1:8888", "n2:8888"]}
        task = {"type": "worker", "index": 0}
        config = json.dumps({"cluster": cluster, "task": task})
        monkeypatch.setenv("TF_CONFIG", config)
        with harness.refused(
            '`strategy` must be "multiworker" where TF_CONFIG names several',
            f"strategy='{strategy}', workers=2",
        ):
            strategies.make(strategy, replicas=1)

    @pytest.mark.parametrize(
        "config", ["", "{}", "no", '{"cluster": {"worker": ["n1:8888"]}}']
    )
    def test_a_worker_that_is_alone(self, monkeypatch, config):
        monkeypatch.setenv("TF_CONFIG", config)
        assert strategies.make("default").num_replicas_in_sync == 1

    def test_unknown_strategy_is_refused(self):
        with harness.refused("`strategy` must be one of", "strategy='many'"):
            strategies.make("many")

    def test_unknown_cluster_is_refused(self):
        with harness.refused(
            "`cluster` must be one of ('tf_config', 'slurm')", "cluster='mesos'"
        ):
            strategies.make("multiworker", cluster="mesos")

    @pytest.mark.parametrize(
        "config", [None, "", "{}", '{"cluster": {"worker": ["n2:8888"]}}']
    )
    def test_no_cluster_is_refused(self, monkeypatch, config):
        monkeypatch.delenv("TF_CONFIG", raising=False)
        if config is not None:
            monkeypatch.setenv("TF_CONFIG", config)
        with harness.refused(
            "`cluster='tf_config'` needs the environment variable TF_CONFIG",
            f"cluster='tf_config', TF_CONFIG={config!r}",
        ):
            strategies.make("multiworker")


def test_tasks_leave_the_devices_to_the_strategy(tmp_path):
    """TensorFlow cannot divide the CPU after it has run anything."""
    # Makes the tasks of all trainers, then runs the command of digits.
    code = """
import importlib, runpy, sys
from examples.studies import benchmarks
data_dir, *sys.argv = sys.argv[1:]
for benchmark in benchmarks.SCALES:
    train = importlib.import_module(f"examples.{benchmark}.train")
    train.task()
    train.task(data="tfds", data_dir=data_dir)
runpy.run_module(sys.argv[0], run_name="__main__")
"""
    flags = ("--strategy=mirrored", "--replicas=2", "--scale=4", "--smoke")
    process = subprocess.run(
        [
            *(sys.executable, "-c", code, str(tmp_path)),
            *("examples.digits.train", *flags, f"--model_dir={tmp_path}"),
        ],
        cwd=sources.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    # Keras's progress bar, with gain and tau.
    assert "gain: " in process.stdout
    assert "scale_invariant_step: " in process.stdout
    result = runs.read(tmp_path).result
    assert result["scale"] == 4
    assert 1 <= result["mean_gain"] <= 4


class TestChief:
    @pytest.mark.parametrize("replicas", [1, 2])
    def test_is_the_only_process(self, strategy_of, replicas):
        assert strategies.is_chief(strategy_of(replicas))

    @pytest.mark.parametrize(
        "job, index, expected",
        [("chief", 0, True), ("worker", 0, False), ("worker", 1, False)],
    )
    def test_is_the_chief_of_a_cluster_that_has_one(self, job, index, expected):
        # A strategy would connect to the others. Its class and TensorFlow's
        # rule answer. Clusters of workers train in tests/processes.
        cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
        extended = object.__new__(
            collective_all_reduce_strategy.CollectiveAllReduceExtended
        )
        extended._is_chief = multi_worker_util.is_chief(cluster, job, index)
        strategy = types.SimpleNamespace(extended=extended)
        assert strategies.is_chief(strategy) == expected

    def test_is_the_process_that_drives_a_tpu(self):
        # Without a TPU there is no such strategy, but its class answers.
        extended = object.__new__(tpu_strategy.TPUExtended)
        assert strategies.is_chief(types.SimpleNamespace(extended=extended))


STEP = {
    "SLURM_JOB_ID": "1025",
    "SLURM_STEP_NUM_TASKS": "4",
    # Two tasks on each of n2 and n10.
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
        # Below are root's ports, and above are Linux's ephemeral ports.
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
        # The environment of a batch script: a node, but no task of a step.
        monkeypatch.setenv("SLURMD_NODENAME", "n2")
        for name in ("JOB_ID", "PROCID", "LOCALID"):
            monkeypatch.setenv(f"SLURM_{name}", "0")
        with harness.refused(
            "`cluster='slurm'` needs a process that `srun` started, which sets "
            "SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, "
            "SLURM_STEP_TASKS_PER_NODE.",
            "cluster='slurm'",
        ):
            strategies.make("multiworker", cluster="slurm")

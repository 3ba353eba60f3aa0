"""What a run is distributed over, and how the scale is made there."""

import os
import sys

import tensorflow as tf

STRATEGIES = ("default", "mirrored", "multiworker", "tpu")
CLUSTERS = ("tf_config", "slurm")

# A Slurm job has 16 ports, below those that Linux hands out to any process:
# 1024 jobs in succession share none, if each has 16 tasks on a node at most.
_FIRST_PORT = 16384
_PORTS_PER_JOB = 16
_JOBS_WITH_PORTS = 1024


def make(strategy, *, replicas=None, tpu=None, cluster="tf_config"):
    """Returns a strategy. Call it before anything else touches TensorFlow.

    Args:
        strategy: str, one of `STRATEGIES`: "default" is one device; "mirrored"
            all GPUs of this machine, or logical CPU devices where it has none;
            "multiworker" the workers of a cluster; "tpu" all cores of a TPU.
        replicas: int >= 1, number of devices. Needed for more than one logical
            CPU device and else by default all there are, except that "mirrored"
            may take fewer GPUs.
        tpu: str, name or address of the TPU; None is found in the environment.
        cluster: str, one of `CLUSTERS`, what tells a worker of the others:
            "tf_config" the environment variable TF_CONFIG; "slurm" what `srun`
            tells each task.

    Returns:
        `tf.distribute.Strategy`.

    Raises:
        ValueError: if the strategy or the cluster is unknown, the strategy has
            other than `replicas`, or nothing tells of a cluster.
    """
    if strategy == "default":
        made = tf.distribute.get_strategy()
    elif strategy == "mirrored":
        made = tf.distribute.MirroredStrategy(_local_devices(replicas))
    elif strategy == "multiworker":
        made = tf.distribute.MultiWorkerMirroredStrategy(_resolver(cluster))
    elif strategy == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        made = tf.distribute.TPUStrategy(resolver)
    else:
        raise ValueError(
            f"The strategy is not known. Expected one of {STRATEGIES}. "
            f"Received: strategy={strategy!r}"
        )
    if replicas not in (None, made.num_replicas_in_sync):
        raise ValueError(
            "The strategy has another number of replicas. Expected "
            f"replicas={made.num_replicas_in_sync} or none given; "
            'strategy="mirrored" makes several on one machine. '
            f"Received: replicas={replicas}, strategy={strategy!r}"
        )
    return made


def split_scale(*, replicas, scale=None, microbatches=None):
    """Returns (scale, micro-batches per replica) with one base batch in each.

        S = replicas * microbatches

    Args:
        replicas: int >= 1.
        scale: int >= 1, S; by default what the others make.
        microbatches: int >= 1; by default what makes the scale, or 1.

    Raises:
        ValueError: if replicas and micro-batches cannot make the scale.

    Example:

    >>> split_scale(replicas=4, scale=64)
    (64, 16)
    >>> split_scale(replicas=4, microbatches=2)
    (8, 2)
    """
    if scale is None:
        scale = replicas * (microbatches or 1)
    if microbatches is None:
        microbatches = scale // replicas
    if replicas * microbatches != scale:
        raise ValueError(
            "Replicas and micro-batches do not make the scale, at one base "
            "batch each. Expected scale = replicas * microbatches. Received: "
            f"scale={scale}, replicas={replicas}, microbatches={microbatches}"
        )
    return scale, microbatches


def is_chief(strategy):
    """Returns whether this process writes logs and checkpoints: one does."""
    return strategy.extended.should_checkpoint


def _resolver(cluster):
    if cluster == "tf_config":
        return _tf_config_resolver()
    if cluster == "slurm":
        return _slurm_resolver()
    raise ValueError(
        f"The cluster is not known. Expected one of {CLUSTERS}. "
        f"Received: cluster={cluster!r}"
    )


def _tf_config_resolver():
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        found = resolver.cluster_spec() and resolver.task_id is not None
    except ValueError:  # It is not JSON.
        found = False
    if not found:
        # TensorFlow would train alone: so would every worker, side by side.
        raise ValueError(
            "No cluster is told of. Expected the environment variable "
            'TF_CONFIG to hold a "cluster" and a "task", as examples/launch.py '
            "sets it. Received: cluster='tf_config', "
            f"TF_CONFIG={os.environ.get('TF_CONFIG')!r}"
        )
    return resolver


def _slurm_resolver():
    """Returns the workers of a Slurm step: one per task.

    TensorFlow's resolver says where they are, and not which of them this is: it
    sorts the nodes by name, n10 before n2, where ranks follow their numbers. It
    would also share out GPUs, which Slurm has done, and fail without any: it is
    told of more than enough, and that it should leave them as they are.
    """
    needed = ("JOB_ID", "PROCID", "LOCALID", "STEP_NUM_TASKS")
    needed += ("STEP_NODELIST", "STEP_TASKS_PER_NODE")
    names = ["SLURMD_NODENAME", *(f"SLURM_{name}" for name in needed)]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            "This process is no task of a Slurm step. Expected `srun` to start "
            f"it, which sets {', '.join(missing)}. Received: cluster='slurm'"
        )
    block = int(os.environ["SLURM_JOB_ID"]) % _JOBS_WITH_PORTS
    port = _FIRST_PORT + block * _PORTS_PER_JOB
    workers = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=port,
        gpus_per_node=sys.maxsize,
        gpus_per_task=1,
        auto_set_gpu=False,
    ).cluster_spec()
    node = os.environ["SLURMD_NODENAME"]
    address = f"{node}:{port + int(os.environ['SLURM_LOCALID'])}"
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        workers,
        task_type="worker",
        task_id=workers.job_tasks("worker").index(address),
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )


def _local_devices(replicas):
    gpus = tf.config.list_logical_devices("GPU") if _has_gpu() else []
    if gpus:
        return [device.name for device in gpus[:replicas]]
    replicas = replicas or 1
    if replicas > 1:
        _make_logical_cpus(replicas)
    return [f"CPU:{number}" for number in range(replicas)]


def _has_gpu():
    return bool(tf.config.list_physical_devices("GPU"))


def _make_logical_cpus(number):
    cpu = tf.config.list_physical_devices("CPU")[0]
    made = tf.config.get_logical_device_configuration(cpu)
    if len(made or []) < number:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * number
        )

"""Distribution strategies, and how replicas and micro-batches make a scale."""

import os
import sys

import tensorflow as tf

STRATEGIES = ("default", "mirrored", "multiworker", "tpu")
CLUSTERS = ("tf_config", "slurm")

# Each Slurm job uses 16 ports, below Linux's range of ephemeral ports. With at
# most 16 tasks on a node, 1024 successive jobs share no port.
_FIRST_PORT = 16384
_PORTS_PER_JOB = 16
_JOBS_WITH_PORTS = 1024


def make(strategy, *, replicas=None, tpu=None, cluster="tf_config"):
    """Returns a strategy. Call this before TensorFlow initializes its devices.

    Args:
        strategy: str, one of `STRATEGIES`: "default" is one device, "mirrored"
            is all GPUs of this machine or logical CPU devices if it has none,
            "multiworker" is the workers of a cluster, and "tpu" is all cores of
            a TPU.
        replicas: int >= 1, number of devices. "mirrored" creates as many
            logical CPU devices, or uses as many GPUs. Other strategies use all
            their devices and check the number.
        tpu: str, name or address of the TPU. Default: from the environment.
        cluster: str, one of `CLUSTERS`, where a worker finds the addresses of
            the others: "tf_config" is the environment variable TF_CONFIG, and
            "slurm" is the environment that `srun` gives each task.

    Returns:
        `tf.distribute.Strategy`.

    Raises:
        ValueError: if the strategy or the cluster is unknown, the number of
            replicas differs, no cluster is configured, or TF_CONFIG names other
            workers and the strategy is for one.
    """
    if strategy in ("default", "mirrored"):
        _check_is_alone(strategy)
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
            f"`strategy` must be one of {STRATEGIES}. "
            f"Received: strategy={strategy!r}"
        )
    if replicas not in (None, made.num_replicas_in_sync):
        raise ValueError(
            "`replicas` must be the number of replicas of the strategy, "
            f"{made.num_replicas_in_sync}, or None. Use "
            'strategy="mirrored" for several replicas on one machine. '
            f"Received: replicas={replicas}, strategy={strategy!r}"
        )
    return made


def split_scale(*, replicas, scale=None, microbatches=None):
    """Returns (scale, micro-batches per replica), each with one base batch.

        S = replicas * microbatches

    Args:
        replicas: int >= 1.
        scale: int >= 1, S. Default: replicas * microbatches.
        microbatches: int >= 1. Default: scale / replicas, or 1.

    Raises:
        ValueError: if `scale` is not replicas * microbatches.

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
            "`scale` must be replicas * microbatches, because each micro-batch "
            f"is one base batch. Received: scale={scale}, replicas={replicas}, "
            f"microbatches={microbatches}"
        )
    return scale, microbatches


def is_chief(strategy):
    """Returns whether this process writes logs and checkpoints."""
    return strategy.extended.should_checkpoint


def _check_is_alone(strategy):
    """Refuses to train several copies that overwrite one another's files."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        jobs = resolver.cluster_spec().as_dict()
    except ValueError:  # TF_CONFIG is not JSON.
        return
    workers = sum(len(jobs.get(job, ())) for job in ("chief", "worker"))
    if workers > 1:
        raise ValueError(
            '`strategy` must be "multiworker" where TF_CONFIG names several '
            "workers: under any other, each trains a copy of its own. "
            f"Received: strategy={strategy!r}, workers={workers}"
        )


def _resolver(cluster):
    if cluster == "tf_config":
        return _tf_config_resolver()
    if cluster == "slurm":
        return _slurm_resolver()
    raise ValueError(
        f"`cluster` must be one of {CLUSTERS}. Received: cluster={cluster!r}"
    )


def _tf_config_resolver():
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        found = resolver.cluster_spec() and resolver.task_id is not None
    except ValueError:  # TF_CONFIG is not JSON.
        found = False
    if not found:
        # Without a cluster, TensorFlow lets every worker train alone.
        raise ValueError(
            "`cluster='tf_config'` needs the environment variable TF_CONFIG, "
            'with a "cluster" and a "task". examples/launch.py sets it. '
            "Received: cluster='tf_config', "
            f"TF_CONFIG={os.environ.get('TF_CONFIG')!r}"
        )
    return resolver


def _slurm_resolver():
    """Returns a resolver for the workers of a Slurm step: one per task.

    TensorFlow's resolver finds the addresses of the workers, but not which one
    this is: it sorts nodes by name (n10 before n2), whereas ranks follow their
    numbers. It also assigns GPUs, which Slurm has done already, and fails if
    there are too few. The arguments about GPUs disable that.
    """
    needed = ("JOB_ID", "PROCID", "LOCALID", "STEP_NUM_TASKS")
    needed += ("STEP_NODELIST", "STEP_TASKS_PER_NODE")
    names = ["SLURMD_NODENAME", *(f"SLURM_{name}" for name in needed)]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            "`cluster='slurm'` needs a process that `srun` started, which "
            f"sets {', '.join(missing)}. Received: cluster='slurm'"
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

"""What a run is distributed over, and how the scale is made there."""

import tensorflow as tf

STRATEGIES = ("default", "mirrored", "multiworker", "tpu")


def make(strategy, *, replicas=None, tpu=None):
    """Returns a strategy. Call it before anything else touches TensorFlow.

    Args:
        strategy: str, one of `STRATEGIES`: "default" is one device; "mirrored"
            all GPUs of this machine, or logical CPU devices where it has none;
            "multiworker" the workers in the environment variable TF_CONFIG;
            "tpu" all cores of a TPU.
        replicas: int >= 1, number of devices. Needed for more than one logical
            CPU device and else by default all there are, except that "mirrored"
            may take fewer GPUs.
        tpu: str, name or address of the TPU; None is found in the environment.

    Returns:
        `tf.distribute.Strategy`.

    Raises:
        ValueError: if the strategy is unknown or has other than `replicas`.
    """
    if strategy == "default":
        made = tf.distribute.get_strategy()
    elif strategy == "mirrored":
        made = tf.distribute.MirroredStrategy(_local_devices(replicas))
    elif strategy == "multiworker":
        made = tf.distribute.MultiWorkerMirroredStrategy()
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
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_id in (None, 0)


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

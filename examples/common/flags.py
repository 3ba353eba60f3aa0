"""The flags that all trainers share: one for each of `training.Settings`."""

from absl import flags, logging

from examples.common import algorithms, strategies, training

_DEFAULTS = training.Settings()

# At INFO, TensorFlow logs each checkpoint in the middle of the progress bar.
logging.set_verbosity(logging.WARNING)

flags.DEFINE_enum(
    "algorithm",
    _DEFAULTS.algorithm,
    algorithms.ALGORITHMS,
    "Scaling algorithm: none (identity), a fixed rule, AdaScale (adamscale for "
    "Adam and similar optimizers), or Adasum.",
)
flags.DEFINE_integer(
    "scale",
    _DEFAULTS.scale,
    "S, the batch of one step / the base batch: replicas x micro-batches, and "
    "by default as many. At S = 1 AdaScale is the plain optimizer. If "
    "--microbatches is not given, each replica takes scale / replicas of them.",
    lower_bound=1,
)
flags.DEFINE_string(
    "elastic",
    _DEFAULTS.elastic,
    "A sequence of scales instead of --scale. 0:4,0.25:8,0.5:16 means S = 4 "
    "for the first quarter of the training, then 8, then 16 for the second "
    "half.",
)
flags.DEFINE_integer(
    "replicas",
    _DEFAULTS.replicas,
    "Number of devices. --strategy=mirrored creates logical CPU devices on a "
    "machine without GPUs. Default: all devices of the strategy.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "microbatches",
    _DEFAULTS.microbatches,
    "Base batches that each replica processes per step, one after the other.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "total_steps",
    _DEFAULTS.total_steps,
    "T_1, steps of training at the base batch. AdaScale stops when tau reaches "
    "it. Default: that of the task.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "iterations",
    _DEFAULTS.iterations,
    "Iterations of lsw_plus: the number that adascale took.",
    lower_bound=1,
)
flags.DEFINE_float(
    "smoothing",
    _DEFAULTS.smoothing,
    "Smoothing of AdaScale's averages. To record a forecast for scale S, use "
    "1 - S / 1000. Default: 1 - S / 1000 for the scale of this run.",
    lower_bound=0.0,
    upper_bound=0.9999,
)
flags.DEFINE_enum(
    "strategy",
    _DEFAULTS.strategy,
    strategies.STRATEGIES,
    "default: one device. mirrored: all GPUs of this machine, or --replicas "
    "logical CPU devices. multiworker: the workers of a cluster. tpu: a TPU.",
)
flags.DEFINE_enum(
    "cluster",
    _DEFAULTS.cluster,
    strategies.CLUSTERS,
    "Source of the workers' addresses for --strategy=multiworker: TF_CONFIG, "
    "set by the launcher or Kubernetes, or Slurm. Default: tf_config.",
)
flags.DEFINE_string(
    "tpu", _DEFAULTS.tpu, "Name or address of the TPU, for --strategy=tpu."
)
flags.DEFINE_integer(
    "seed",
    _DEFAULTS.seed,
    "Seed of the weights and the order of the data.",
    lower_bound=0,
)
flags.DEFINE_string(
    "model_dir",
    _DEFAULTS.model_dir,
    "Directory of logs and checkpoints. The same command resumes a run that "
    "was stopped. Default: a directory below out/.",
)
flags.DEFINE_bool(
    "jit_compile",
    _DEFAULTS.jit_compile,
    "Compile each replica's step with XLA.",
)
flags.DEFINE_integer(
    "steps_per_execution",
    _DEFAULTS.steps_per_execution,
    "Steps per call of the compiled function. Training ends at a multiple.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "mixed_precision",
    _DEFAULTS.mixed_precision,
    training.PRECISIONS,
    "Precision of the computation. Weights stay float32.",
)
flags.DEFINE_bool(
    "smoke",
    _DEFAULTS.smoke,
    f"Train for {training.SMOKE_STEPS} base steps, unless --total_steps is "
    f"given, and test on {training.SMOKE_TEST_BATCHES} batches.",
)


_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    "Learning rate of the first step at the base batch. Default: that of the "
    "task.",
    lower_bound=0.0,
)


def overrides():
    """Returns the flags that override defaults of a trainer's `task`."""
    rate = _LEARNING_RATE.value
    return {} if rate is None else {"learning_rate": rate}


def settings():
    """Returns the flags as `training.Settings`."""
    return _settings(flags.FLAGS)


def _settings(values):
    return training.Settings(
        **{name: values[name].value for name in training.Settings._fields}
    )


@flags.multi_flags_validator(list(training.Settings._fields))
def _check(values):
    try:
        training.check(training.Settings(**values))
    except ValueError as error:
        raise flags.ValidationError(str(error)) from error
    return True

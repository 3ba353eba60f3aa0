"""The flags that all trainers share, see `training.Settings`."""

from absl import flags, logging

from examples import algorithms, strategies, training

_DEFAULTS = training.Settings()

# At INFO, TensorFlow tells of every checkpoint amid the progress bar.
logging.set_verbosity(logging.WARNING)

flags.DEFINE_enum(
    "algorithm",
    _DEFAULTS.algorithm,
    algorithms.ALGORITHMS,
    "How training is scaled: not at all, by a fixed rule, by AdaScale, which "
    "for Adam and the like is adamscale, or by Adasum.",
)
flags.DEFINE_integer(
    "scale",
    _DEFAULTS.scale,
    "S, the batch of one step / the base batch: replicas x micro-batches. "
    "Given alone, each replica takes scale / replicas micro-batches.",
    lower_bound=1,
)
flags.DEFINE_string(
    "elastic",
    _DEFAULTS.elastic,
    "Instead of --scale, scales and the parts of the training they begin at: "
    "0:4,0.25:8,0.5:16 is S = 4 for the first quarter, then 8, and 16 for the "
    "second half.",
)
flags.DEFINE_integer(
    "replicas",
    _DEFAULTS.replicas,
    "Number of devices. With --strategy=mirrored on a machine without GPUs, as "
    "many logical CPU devices are made. Default: all devices of the strategy.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "microbatches",
    _DEFAULTS.microbatches,
    "Base batches that each replica takes per step, one after the other.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "total_steps",
    _DEFAULTS.total_steps,
    "T_1, steps of training at the base batch; for adascale the tau to reach. "
    "Default: the task's.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "iterations",
    _DEFAULTS.iterations,
    "Iterations of lsw_plus: those that adascale took.",
    lower_bound=1,
)
flags.DEFINE_float(
    "smoothing",
    _DEFAULTS.smoothing,
    "AdaScale's averages: 1 - S / 1000 are those of a run at scale S, which a "
    "forecast for S should be recorded with. Default: those of this run.",
    lower_bound=0.0,
    upper_bound=0.9999,
)
flags.DEFINE_enum(
    "strategy",
    _DEFAULTS.strategy,
    strategies.STRATEGIES,
    "One device; all GPUs of this machine, or logical CPU devices; the workers "
    "of a cluster; a TPU.",
)
flags.DEFINE_enum(
    "cluster",
    _DEFAULTS.cluster,
    strategies.CLUSTERS,
    "Who names the workers of --strategy=multiworker: TF_CONFIG, as the "
    "launcher and Kubernetes set it, or Slurm. Default: tf_config.",
)
flags.DEFINE_string(
    "tpu", _DEFAULTS.tpu, "Name or address of the TPU, for --strategy=tpu."
)
flags.DEFINE_integer(
    "seed",
    _DEFAULTS.seed,
    "Seed of the weights and of the order of the data.",
    lower_bound=0,
)
flags.DEFINE_string(
    "model_dir",
    _DEFAULTS.model_dir,
    "Where logs and checkpoints go. A run that was stopped goes on from there "
    "when the same command is given again. Default: one below out/.",
)
flags.DEFINE_bool(
    "jit_compile",
    _DEFAULTS.jit_compile,
    "Compile each replica's step with XLA.",
)
flags.DEFINE_integer(
    "steps_per_execution",
    _DEFAULTS.steps_per_execution,
    "Steps taken between two looks at the result. Training ends on a multiple.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "mixed_precision",
    _DEFAULTS.mixed_precision,
    training.PRECISIONS,
    "Precision of the computation; weights are float32.",
)
flags.DEFINE_bool(
    "smoke",
    _DEFAULTS.smoke,
    f"Take {training.SMOKE_STEPS} steps unless --total_steps says otherwise, "
    f"and test on {training.SMOKE_TEST_BATCHES} batches.",
)


_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    "Learning rate of the first step at the base batch. Default: the task's.",
    lower_bound=0.0,
)


def overrides():
    """Returns the keyword arguments of a trainer's `task` that flags gave."""
    rate = _LEARNING_RATE.value
    return {} if rate is None else {"learning_rate": rate}


def settings():
    """Returns the parsed flags as `training.Settings`."""
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

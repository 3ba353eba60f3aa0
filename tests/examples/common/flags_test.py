"""Flags of the trainers."""

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from examples.common import data_flags, flags, training
from tests import harness


def parsed(*arguments):
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["train", *arguments])
        return flags.settings()


def test_defaults_are_those_of_settings():
    assert parsed() == training.Settings()


def test_each_setting_is_a_flag():
    settings = training.Settings(
        algorithm="lsw_plus",
        scale=8,
        replicas=2,
        microbatches=4,
        total_steps=100,
        iterations=30,
        smoothing=0.5,
        strategy="tpu",
        tpu="local",
        seed=3,
        model_dir="here",
        jit_compile=True,
        steps_per_execution=5,
        mixed_precision="mixed_bfloat16",
        smoke=True,
    )
    given = parsed(
        *(
            f"--{name}={value}"
            for name, value in settings._asdict().items()
            # These exclude a scale and a TPU.
            if name not in ("elastic", "cluster")
        )
    )
    assert given == settings
    several = parsed("--strategy=multiworker", "--cluster=slurm")
    assert several.cluster == "slurm"
    assert parsed("--elastic=0:4,0.5:8").elastic == "0:4,0.5:8"


@pytest.mark.parametrize(
    "arguments, keywords",
    [([], {}), (["--learning_rate=0.5"], {"learning_rate": 0.5})],
)
def test_only_a_given_rate_overrides(arguments, keywords):
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["train", *arguments])
        assert flags.overrides() == keywords


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--algorithm=adam"], "should be one of"),
        (["--algorithm=lsw_plus"], "`iterations` must be given for lsw_plus"),
        (["--scale=0"], "positive integer"),
        (["--microbatches=0"], "positive integer"),
        (["--total_steps=-1"], "positive integer"),
        (["--seed=-1"], "non-negative integer"),
        (["--tpu=local"], 'strategy="tpu"'),
        (["--cluster=slurm"], 'strategy="multiworker"'),
        (["--strategy=multiworker", "--cluster=mesos"], "should be one of"),
        (
            ["--scale=6", "--replicas=2", "--microbatches=2"],
            r"`scale` must be replicas \* microbatches",
        ),
        (["--mixed_precision=float64"], "should be one of"),
        (["--elastic=0:4,0.5"], "`elastic` must be pairs"),
        (["--elastic=0:4,0.5:8", "--scale=4"], "`elastic` must not be"),
        (
            ["--elastic=0:4,0.5:8", "--algorithm=sqrt"],
            "if the scale changes during training",
        ),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(absl_flags.IllegalFlagValueError, match=message):
        parsed(*arguments)


def test_data_of_a_task():
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["train", "--data=tfds", "--split=validation"])
        assert data_flags.values() == {
            "data": "tfds",
            "data_dir": None,
            "split": "validation",
        }
    with pytest.raises(absl_flags.IllegalFlagValueError, match="one of"):
        absl_flags.FLAGS(["train", "--data=mnist"])


@pytest.mark.parametrize(
    "given", [{"data": "mnist"}, {"split": "train"}], ids=str
)
def test_unknown_data_are_refused(given):
    ((name, value),) = given.items()
    with harness.refused(f"`{name}` must be one of", f"{name}={value!r}"):
        data_flags.task_name(
            "digits", **{"data": "embedded", "split": "test", **given}
        )

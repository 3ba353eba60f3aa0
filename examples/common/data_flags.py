"""Flags of the trainers that have a miniature and a full size."""

from absl import flags

DATA = ("embedded", "tfds")
SPLITS = ("test", "validation")

_DATA = flags.DEFINE_enum(
    "data",
    DATA[0],
    DATA,
    "embedded: a miniature on data that needs no download. tfds: the paper's "
    "model on a dataset of tensorflow-datasets.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Directory in which the dataset of --data=tfds was prepared, see "
    "examples/common/data/prepared.py. Default: that of tensorflow-datasets.",
)
_SPLIT = flags.DEFINE_enum(
    "split",
    SPLITS[0],
    SPLITS,
    "Data to test on. Use validation to choose hyper-parameters: it trains on "
    "part of the training data and tests on the rest.",
)


def values():
    """Returns the flags as keyword arguments of a trainer's `task`."""
    return {
        "data": _DATA.value,
        "data_dir": _DATA_DIR.value,
        "split": _SPLIT.value,
    }


def task_name(name, *, data, split):
    """Returns a name that keeps runs on different data apart.

    Args:
        name: str, of the benchmark.
        data: str, one of `DATA`.
        split: str, one of `SPLITS`.

    Raises:
        ValueError: if `data` or `split` is unknown.

    Example:

    >>> task_name("cifar10", data="embedded", split="test")
    'cifar10'
    >>> task_name("cifar10", data="tfds", split="validation")
    'cifar10-tfds-validation'
    """
    for argument, value, known in (
        ("data", data, DATA),
        ("split", split, SPLITS),
    ):
        if value not in known:
            raise ValueError(
                f"`{argument}` must be one of {known}. "
                f"Received: {argument}={value!r}"
            )
    differing = [
        value for value in (data, split) if value not in (DATA[0], SPLITS[0])
    ]
    return "-".join([name, *differing])

"""The flags of trainers that have two sizes: what is trained, on what data."""

from absl import flags

DATA = ("embedded", "tfds")
SPLITS = ("test", "validation")

_DATA = flags.DEFINE_enum(
    "data",
    DATA[0],
    DATA,
    "A miniature on data that comes with Python packages or is generated, or "
    "the paper's model on a dataset of tensorflow-datasets.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Where the dataset of --data=tfds was prepared, see examples/prepared.py. "
    "Default: where tensorflow-datasets prepares.",
)
_SPLIT = flags.DEFINE_enum(
    "split",
    SPLITS[0],
    SPLITS,
    "What is tested on. Hyper-parameters are chosen with --split=validation, "
    "which trains on part of the training data and tests on the rest of it.",
)


def values():
    """Returns the flags as keyword arguments of a trainer's `task`."""
    return {
        "data": _DATA.value,
        "data_dir": _DATA_DIR.value,
        "split": _SPLIT.value,
    }


def task_name(name, *, data, split):
    """Returns a name that keeps the runs on other data apart.

    Args:
        name: str, of the benchmark.
        data: str, one of `DATA`.
        split: str, one of `SPLITS`.

    Raises:
        ValueError: if data or split are none of these.

    Example:

    >>> task_name("cifar10", data="embedded", split="test")
    'cifar10'
    >>> task_name("cifar10", data="tfds", split="validation")
    'cifar10-tfds-validation'
    """
    if data not in DATA or split not in SPLITS:
        raise ValueError(
            f"The data are not known. Expected data, one of {DATA}, and split, "
            f"one of {SPLITS}. Received: data={data!r}, split={split!r}"
        )
    differing = [
        value for value in (data, split) if value not in (DATA[0], SPLITS[0])
    ]
    return "-".join([name, *differing])

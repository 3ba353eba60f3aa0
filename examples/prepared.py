"""Datasets of tensorflow-datasets that were prepared beforehand.

Nothing is downloaded while training: without a network, or with files to be
placed by hand, that fails late and says little. Prepare a dataset once, by

    python -m examples.prepared cifar10 --data_dir=DIRECTORY
"""

import argparse

import tensorflow_datasets as tfds

# What a TFRecord file holds beside a record's bytes: its length and checksums.
BYTES_PER_RECORD = 16


def load(name, split, *, data_dir=None, decoders=None, by_hand=None):
    """Returns the records of a split, in the order in which they are stored.

    Args:
        name: str, as in "cifar10" or "voc/2007".
        split: str, a split of tensorflow-datasets, as in "train[:90%]" or
            "train+validation".
        data_dir: str, where it was prepared; by default where
            tensorflow-datasets prepares.
        decoders: nested dict from feature to `tfds.decode.Decoder`, as in
            `{"image": tfds.decode.SkipDecoding()}`.
        by_hand: str, what has to be placed by hand before it can be prepared.

    Returns:
        `(dataset, size)`: a finite `tf.data.Dataset` and the number of its
        records.

    Raises:
        ValueError: if the dataset is not prepared, lacks files or part of one,
            or has no such split.
    """
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.info.splits:
        raise ValueError(
            f"{name} is not prepared. Expected it to be prepared beforehand: "
            f"{command(name, data_dir=data_dir)}"
            + (f" (place by hand first: {by_hand})" if by_hand else "")
            + f". Received: data_dir={str(builder.data_dir)!r}"
        )
    try:
        instructions = builder.info.splits[split]
    except ValueError as error:
        raise ValueError(
            f"{name} has no such split. Expected one made of "
            f"{sorted(builder.info.splits)}. Received: split={split!r}"
        ) from error
    for part in builder.info.splits.values():
        _check_files(name, part, data_dir=data_dir)
    dataset = builder.as_dataset(
        split=split,
        decoders=decoders,
        read_config=tfds.ReadConfig(try_autocache=False),
    )
    return dataset, instructions.num_examples


def command(name, *, data_dir=None):
    """Returns the command that prepares a dataset.

    Example:

    >>> command("voc/2007", data_dir="datasets")
    'python -m examples.prepared voc/2007 --data_dir=datasets'
    """
    where = f" --data_dir={data_dir}" if data_dir else ""
    return f"python -m examples.prepared {name}{where}"


def _check_files(name, split, *, data_dir):
    """Raises a ValueError unless a split's files are there, and whole."""
    expected = int(split.num_bytes) + BYTES_PER_RECORD * split.num_examples
    found = sum(path.stat().length for path in split.filepaths if path.exists())
    is_records = str(split.filepaths[0]).rpartition("/")[2].count(".tfrecord")
    if is_records and split.num_bytes and found != expected:
        raise ValueError(
            f"The files of {name} are not whole. Expected {expected} bytes in "
            f"split {split.name!r}; remove the directory and prepare it again: "
            f"{command(name, data_dir=data_dir)}. Received: bytes={found}, "
            f"directory={str(split.filepaths[0].parent)!r}"
        )


def main(arguments=None):
    """Downloads and prepares one dataset, showing progress."""
    parser = argparse.ArgumentParser(
        description="Downloads and prepares a dataset of tensorflow-datasets."
    )
    parser.add_argument("name", help='as in "cifar10" or "voc/2007"')
    parser.add_argument("--data_dir", help="directory to prepare it in")
    options = parser.parse_args(arguments)
    builder = tfds.builder(options.name, data_dir=options.data_dir)
    builder.download_and_prepare()
    print(builder.info.splits)


if __name__ == "__main__":
    main()

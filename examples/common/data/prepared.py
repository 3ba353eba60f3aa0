"""Datasets of tensorflow-datasets that were prepared before training.

Trainers never download: without a network, or where files must be placed by
hand, a download fails late and with an unclear message. This command prepares
a dataset once:

    python -m examples.common.data.prepared cifar10 --data_dir=DIRECTORY
"""

import argparse

import tensorflow_datasets as tfds

# A TFRecord file also stores the length and checksums of each record.
BYTES_PER_RECORD = 16


def load(name, split, *, data_dir=None, decoders=None, by_hand=None):
    """Returns the records of a split in the order in which they are stored.

    Args:
        name: str, for example "cifar10" or "voc/2007".
        split: str, a split of tensorflow-datasets, for example "train[:90%]"
            or "train+validation".
        data_dir: str, directory in which the dataset was prepared. Default:
            that of tensorflow-datasets.
        decoders: nested dict from feature to `tfds.decode.Decoder`, for example
            `{"image": tfds.decode.SkipDecoding()}`.
        by_hand: str, files that must be placed by hand before preparing.

    Returns:
        `(dataset, size)`: a finite `tf.data.Dataset` and its number of records.

    Raises:
        ValueError: if the dataset is not prepared, is incomplete, or has no
            such split.
    """
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.info.splits:
        raise ValueError(
            f"`data_dir` must contain the prepared dataset {name}. Run: "
            f"{command(name, data_dir=data_dir)}"
            + (f" (first place by hand: {by_hand})" if by_hand else "")
            + f". Received: data_dir={str(builder.data_dir)!r}"
        )
    try:
        instructions = builder.info.splits[split]
    except ValueError as error:
        raise ValueError(
            f"`split` must be made of the splits of {name}: "
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
    'python -m examples.common.data.prepared voc/2007 --data_dir=datasets'
    """
    flag = f" --data_dir={data_dir}" if data_dir else ""
    return f"python -m examples.common.data.prepared {name}{flag}"


def _check_files(name, split, *, data_dir):
    """Raises a ValueError unless a split's files exist and are complete."""
    expected = int(split.num_bytes) + BYTES_PER_RECORD * split.num_examples
    found = sum(path.stat().length for path in split.filepaths if path.exists())
    is_records = str(split.filepaths[0]).rpartition("/")[2].count(".tfrecord")
    if is_records and split.num_bytes and found != expected:
        raise ValueError(
            f"`data_dir` must contain all {expected} bytes of split "
            f"{split.name!r} of {name}. Remove the directory and run: "
            f"{command(name, data_dir=data_dir)}. Received: bytes={found}, "
            f"directory={str(split.filepaths[0].parent)!r}"
        )


def main(arguments=None):
    """Downloads and prepares one dataset and shows progress."""
    parser = argparse.ArgumentParser(
        description="Downloads and prepares a dataset of tensorflow-datasets."
    )
    parser.add_argument("name", help='for example "cifar10" or "voc/2007"')
    parser.add_argument("--data_dir", help="directory to prepare it in")
    options = parser.parse_args(arguments)
    builder = tfds.builder(options.name, data_dir=options.data_dir)
    builder.download_and_prepare()
    print(builder.info.splits)


if __name__ == "__main__":
    main()

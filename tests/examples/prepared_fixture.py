"""Writes tiny genuine datasets of tensorflow-datasets.

The stock builder writes real TFRecord files, feature specs, splits and slices.
Only the examples are replaced.
"""

import contextlib
import io
import unittest.mock

import tensorflow_datasets as tfds


def prepare(name, data_dir, splits):
    """Writes a dataset.

    Args:
        name: str, of the builder, for example "cifar10" or "voc/2007".
        data_dir: path, directory to write to.
        splits: dict from the name of a split to a list of (key, example).
    """
    builder = tfds.builder(name, data_dir=str(data_dir))
    replaced = {
        "_split_generators": lambda self, *_, **__: {
            split: iter(examples) for split, examples in splits.items()
        },
        "MANUAL_DOWNLOAD_INSTRUCTIONS": None,
    }
    with (
        unittest.mock.patch.multiple(type(builder), **replaced),
        contextlib.redirect_stderr(io.StringIO()),  # Its progress bars.
    ):
        builder.download_and_prepare()

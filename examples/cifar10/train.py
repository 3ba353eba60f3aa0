"""Trains ResNet-18 v2 on CIFAR-10, or a small one on handwritten digits.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020: cifar10, tables 1 to 3 and B.4.1

Miniature, no download:

Command:  python -m examples.cifar10.train --algorithm=adascale --scale=64
Hardware: 2 CPU cores
Time:     30 seconds; 15 with --algorithm=identity --scale=1
Metric:   accuracy on the test split: 99 % for both

Full size, the paper's model and data:

Command:  python -m examples.common.data.prepared cifar10 --data_dir=DIR
          python -m examples.cifar10.train --data=tfds --data_dir=DIR --scale=8
Hardware: a GPU, or several with --strategy=mirrored
Metric:   accuracy on the test split: 94.1 % in the paper, at S = 1 and 8
"""

import keras
from absl import app

from examples.cifar10 import data as sources
from examples.cifar10 import model
from examples.common import data_flags, flags, training

# Learning rate of the last step / that of the first.
DECAY = 0.0133


def task(*, data="embedded", data_dir=None, split="test", learning_rate=0.08):
    """Returns the benchmark as a `training.Task`.

    Args:
        data: str, "embedded" for the miniature or "tfds" for the full size.
        data_dir: str, directory in which CIFAR-10 was prepared.
        split: str, "test" or "validation", the data to test on.
        learning_rate: float, of the first step at the base batch.

    Raises:
        ValueError: if `data` or `split` is unknown.
    """
    validation = split == "validation"
    if data == "tfds":
        source = sources.cifar10(data_dir=data_dir, validation=validation)
        size, base_batch, total_steps = model.FULL, 128, 39_100
    else:
        source = sources.digits(validation=validation)
        size, base_batch, total_steps = model.MINIATURE, 16, 1500
    return training.Task(
        name=data_flags.task_name("cifar10", data=data, split=split),
        base_batch=base_batch,
        total_steps=total_steps,
        schedule=lambda total_steps: (
            keras.optimizers.schedules.ExponentialDecay(
                learning_rate, decay_steps=total_steps, decay_rate=DECAY
            )
        ),
        optimizer=lambda schedule: keras.optimizers.SGD(schedule, momentum=0.9),
        model=lambda: model.resnet(size),
        train_dataset=source.train_dataset,
        test_dataset=source.test_dataset,
        loss=lambda: keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        ),
        metrics=lambda: ["accuracy"],
        metric="accuracy",
    )


def main(_):
    """Trains with the settings of the flags."""
    training.run(
        task(**data_flags.values(), **flags.overrides()), flags.settings()
    )


if __name__ == "__main__":
    app.run(main)

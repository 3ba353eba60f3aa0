r"""Trains ResNet-50 on ImageNet, or a small one on colored digits on photos.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020: imagenet, appendix B.4.2

Miniature, no download:

Command:  python -m examples.imagenet.train --algorithm=adascale --scale=32
Hardware: 2 CPU cores
Time:     4 minutes; 41 seconds with --algorithm=identity --scale=1
Metric:   accuracy on the test split: 98 % for both; 16 % with --algorithm=lsw

Full size, the paper's model and data. First place ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar in DIR/downloads/manual:

Command:  python -m examples.common.data.prepared imagenet2012 --data_dir=DIR
          python -m examples.imagenet.train --data=tfds --data_dir=DIR \
              --strategy=mirrored --scale=16
Hardware: GPUs
Metric:   accuracy on ImageNet's validation split
"""

import keras
from absl import app

from examples.common import data_flags, flags, training
from examples.imagenet import data as sources
from examples.imagenet import model

# Fractions of total_steps after which the learning rate falls to a tenth.
DECAYS = (150_240 / 451_000, 300_480 / 451_000, 400_640 / 451_000)


def task(
    *,
    data="embedded",
    data_dir=None,
    split="test",
    learning_rate=0.1,
    image_size=224,
):
    """Returns the benchmark as a `training.Task`.

    Args:
        data: str, "embedded" for the miniature or "tfds" for ImageNet.
        data_dir: str, directory in which ImageNet was prepared.
        split: str, "test" or "validation", the data to test on.
        learning_rate: float, of the first step at the base batch.
        image_size: int, pixels of a side of ImageNet's images.

    Raises:
        ValueError: if `data` or `split` is unknown.
    """
    if data == "tfds":
        source = sources.ImageNet(split, data_dir, image_size)
        size, base_batch, total_steps = model.RESNET_50, 256, 451_000
    else:
        source = sources.Miniature(split)
        size, base_batch, total_steps = model.MINIATURE, 32, 2000
        image_size = source.SIZE
    return training.Task(
        name=data_flags.task_name("imagenet", data=data, split=split),
        base_batch=base_batch,
        total_steps=total_steps,
        schedule=lambda steps: step_decay(learning_rate, steps),
        optimizer=lambda schedule: keras.optimizers.SGD(schedule, momentum=0.9),
        model=lambda: model.resnet(size, image_size=image_size),
        train_dataset=source.train_dataset,
        test_dataset=source.test_dataset,
        loss=lambda: keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        ),
        metrics=lambda: ["accuracy"],
        metric="accuracy",
    )


def step_decay(learning_rate, total_steps):
    """Returns the paper's schedule, stretched to a number of steps."""
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(fraction * total_steps) for fraction in DECAYS],
        [learning_rate / 10**decays for decays in range(len(DECAYS) + 1)],
    )


def main(_):
    """Trains with the settings of the flags."""
    training.run(
        task(**data_flags.values(), **flags.overrides()), flags.settings()
    )


if __name__ == "__main__":
    app.run(main)

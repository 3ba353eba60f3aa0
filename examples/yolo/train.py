r"""Trains YOLOv3 on Pascal VOC, or a small one on digits pasted on photos.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020: yolo, tables 1 to 3 and B.4.5

Miniature, no download:

Command:  python -m examples.yolo.train --algorithm=adascale --scale=32
Hardware: 2 CPU cores
Time:     10 minutes on a busy machine; 50 seconds with --algorithm=identity
          --scale=1 on an idle one
Metric:   map on the test split: mean average precision at an overlap of 0.5, as
          defined by VOC 2007; see docs/results.md

Full size, the paper's model and data:

Command:  python -m examples.common.data.prepared voc/2007 --data_dir=DIR
          python -m examples.common.data.prepared voc/2012 --data_dir=DIR
          python -m examples.yolo.train --data=tfds --data_dir=DIR --scale=16 \
              --backbone_weights=FILE --strategy=mirrored
Hardware: GPUs
Metric:   map on VOC 2007 test: in the paper 80.2 % at S = 1, 81.5 % at S = 16
"""

import functools

import keras
from absl import app
from absl import flags as absl_flags

from examples.common import data_flags, flags, training
from examples.yolo import boxes, loss, metric, model
from examples.yolo import data as sources

BASE_BATCH = 16
MOMENTUM = 0.9
# The paper's number of steps, and the steps at which the learning rate falls to
# a tenth.
TOTAL_STEPS = 207_000
BOUNDARIES = (160_000, 180_000)
LEARNING_RATE = 2.5e-4
MINIATURE_TOTAL_STEPS = 2000
MINIATURE_LEARNING_RATE = 0.006

_BACKBONE_WEIGHTS = absl_flags.DEFINE_string(
    "backbone_weights",
    None,
    "Initial weights of the backbone: a .weights.h5 file that save_weights of "
    "examples.yolo.model.darknet wrote. Default: random weights.",
)
_IMAGE_SIZE = absl_flags.DEFINE_integer(
    "image_size",
    model.FULL.image_size,
    "Pixels of a side of the images of --data=tfds, a multiple of 32.",
    lower_bound=32,
)


def sgd(schedule):
    """Returns SGD with momentum. The model's loss includes weight decay."""
    return keras.optimizers.SGD(schedule, momentum=MOMENTUM)


def step_decay(total_steps, *, learning_rate):
    """Returns the paper's schedule, stretched to another number of steps.

    Args:
        total_steps: int >= 1, T_1.
        learning_rate: float, of the first step.

    Returns:
        `keras.optimizers.schedules.LearningRateSchedule`.

    Example:

    >>> schedule = step_decay(2070, learning_rate=1.0)
    >>> [round(float(schedule(step)), 2) for step in (1600, 1601, 1801)]
    [1.0, 0.1, 0.01]
    """
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(step * total_steps / TOTAL_STEPS) for step in BOUNDARIES],
        [learning_rate, learning_rate / 10, learning_rate / 100],
    )


def task(
    *,
    data="embedded",
    data_dir=None,
    split="test",
    learning_rate=None,
    backbone_weights=None,
    image_size=model.FULL.image_size,
):
    """Returns the benchmark as a `training.Task`.

    Args:
        data: str, "embedded" for the miniature or "tfds" for the full size.
        data_dir: str, directory in which voc/2007 and voc/2012 were prepared.
        split: str, "test" or "validation", the data to test on.
        learning_rate: float, of the first step at the base batch. Default: that
            of the paper, or that of the miniature.
        backbone_weights: str, path of the initial weights of the backbone.
        image_size: int, pixels of a side of the images of "tfds".

    Raises:
        ValueError: if `data` or `split` is unknown.
    """
    name = data_flags.task_name("yolo", data=data, split=split)
    if data == "tfds":
        size = model.FULL._replace(image_size=image_size)
        source = sources.voc(
            image_size=image_size, data_dir=data_dir, split=split
        )
        total_steps, default = TOTAL_STEPS, LEARNING_RATE
    else:
        size = model.MINIATURE
        source = sources.digits(split=split)
        total_steps, default = MINIATURE_TOTAL_STEPS, MINIATURE_LEARNING_RATE
    geometry = {"heads": size.heads, "image_size": size.image_size}
    return training.Task(
        name=name,
        base_batch=BASE_BATCH,
        total_steps=total_steps,
        schedule=functools.partial(
            step_decay, learning_rate=learning_rate or default
        ),
        optimizer=sgd,
        model=lambda: model.yolo(size, backbone_weights=backbone_weights),
        train_dataset=source.train_dataset,
        test_dataset=source.test_dataset,
        loss=lambda: loss.Loss(**geometry),
        metrics=list,
        metric="map",
        evaluate=functools.partial(
            metric.evaluate, priors=boxes.priors(**geometry)
        ),
    )


def main(_):
    """Trains with the settings of the flags."""
    training.run(
        task(
            **data_flags.values(),
            **flags.overrides(),
            backbone_weights=_BACKBONE_WEIGHTS.value,
            image_size=_IMAGE_SIZE.value,
        ),
        flags.settings(),
    )


if __name__ == "__main__":
    app.run(main)

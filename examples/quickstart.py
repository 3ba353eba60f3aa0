"""Trains digits at 16 times the batch size that the schedule was tuned for.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020
Command:  python examples/quickstart.py
Hardware: 2 CPU cores
Time:     15 seconds
Metric:   test accuracy: 97 % after 300 steps; 97 % after 1600 steps with
          --microbatches=1, which is plain SGD at the base batch
"""

import argparse

import keras
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tf_adascale

BASE_BATCH = 8  # The schedule below was tuned for this batch size ...
BASE_STEPS = 1600  # ... and this number of steps.


def make_model(microbatches):
    """Returns a compiled network for 8x8 images."""
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(16, 3, activation="relu")(inputs)
    x = keras.layers.Conv2D(32, 3, activation="relu")(x)
    outputs = keras.layers.Dense(10)(keras.layers.Flatten()(x))
    # AdaScale: a keras.Model whose training step has micro-batches.
    model = tf_adascale.Model(inputs, outputs)
    schedule = keras.optimizers.schedules.ExponentialDecay(
        0.03, BASE_STEPS, 0.01
    )
    model.compile(
        # AdaScale: multiplies the learning rate by the gain, the number of base
        # steps that a step is worth, and evaluates the schedule at their sum.
        tf_adascale.AdaScale(keras.optimizers.SGD(schedule, momentum=0.9)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # AdaScale: each micro-batch is a base batch and a gradient sample. The
        # variance of the samples determines the gain.
        microbatches=microbatches,
    )
    return model


def main(arguments=None):
    """Trains, prints the result, and returns steps and accuracy."""
    parser = argparse.ArgumentParser(description="AdaScale on digits.")
    parser.add_argument("--microbatches", type=int, default=16)
    microbatches = parser.parse_args(arguments).microbatches

    keras.utils.set_random_seed(0)
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        digits.images[..., None] / 16, digits.target, random_state=0
    )
    batch = microbatches * BASE_BATCH
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    model = make_model(microbatches)
    model.fit(
        dataset.shuffle(len(x), seed=0).repeat().batch(batch),
        steps_per_epoch=20,
        epochs=BASE_STEPS // 20,  # At most: a callback ends training.
        shuffle=False,  # The dataset is shuffled already.
        verbose=2,
        callbacks=[
            # AdaScale: ends training when the gains add up to BASE_STEPS.
            tf_adascale.callbacks.StopAtScaleInvariantStep(BASE_STEPS),
            # AdaScale: adds the gain, their sum, the learning rate and the
            # noise scale to the output of `fit`.
            tf_adascale.callbacks.ScalingLog(),
        ],
    )
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    steps = int(model.optimizer.iterations)
    print(
        f"{steps} steps of {batch} examples did the work of {BASE_STEPS} steps "
        f"of {BASE_BATCH}. Test accuracy: {accuracy:.1%}"
    )
    return steps, accuracy


if __name__ == "__main__":
    main()

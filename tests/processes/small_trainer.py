"""A trainer that tests stop and kill: digits, with a two-layer network.

python tests/processes/small_trainer.py --scale=4 --model_dir=out/small
"""

import keras
from absl import app
from keras import layers

import tf_adascale
from examples.common import flags, training
from examples.digits import train


def model():
    """Returns a model that trains in a tenth of the ResNet's time.

    Two replicas train it like one, because it has no dropout and no batch
    normalization, whose moving statistics Keras keeps per replica.
    """
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(256, activation="relu")(layers.Flatten()(inputs))
    return tf_adascale.Model(inputs, layers.Dense(10)(x))


def main(_):
    """Trains as the flags say."""
    task = train.task(learning_rate=0.02)._replace(model=model)
    training.run(task, flags.settings())


if __name__ == "__main__":
    app.run(main)

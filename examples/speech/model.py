"""Deep Speech 2: convolutions over a spectrogram, recurrent layers, CTC.

Full size:

    layer             kernel (time x frequency), strides        parameters
    convolution       11 x 41, 2 x 2: 1 to 32 channels              14,464
    convolution       11 x 21, 1 x 2: 32 to 32 channels            236,576
    5 bidirectional   41 bins x 32 channels, then 800,          40,905,600
      GRU             to 800: the sum of both directions
    dense             800 to 28 characters and the blank            23,229
    batch norm        on the input of each of the 8 layers          10,690

The AdaScale paper (appendix B.4.3) does not specify the kernels, the clipped
ReLU after each convolution, and the sum: they are from Amodei et al.

The utterances of a batch are padded to one length. Padding does not change the
result: convolutions see zeros, the batch statistics ignore it, the recurrent
layers skip it (the backward one starts at the last frame of an utterance), and
the output there is the blank with probability 1.

Reference: Amodei et al., "Deep Speech 2: End-to-End Speech Recognition in
English and Mandarin", 2016.
"""

from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

import tf_adascale

# Frames of the spectrogram per frame of the network's output.
TIME_STRIDE = 2
# The logit of every character in the padding: exp(-1e4) is 0.
IMPOSSIBLE = -1e4


class Size(NamedTuple):
    """The size of the network.

    Attributes:
        filters: int, channels of each convolution.
        kernels: two tuples (frames, bins), the sizes of the kernels.
        recurrent_layers: int, number of bidirectional GRUs.
        units: int, width of each direction of a GRU.
        momentum: float, of the moving statistics of batch normalization.
    """

    filters: int
    kernels: tuple[tuple[int, int], tuple[int, int]]
    recurrent_layers: int
    units: int
    momentum: float


FULL = Size(
    filters=32,
    kernels=((11, 41), (11, 21)),
    recurrent_layers=5,
    units=800,
    momentum=0.997,
)
MINIATURE = Size(
    filters=12,
    kernels=((5, 11), (5, 11)),
    recurrent_layers=2,
    units=64,
    momentum=0.95,
)


def output_lengths(lengths):
    """Returns the number of output frames for frames of a spectrogram.

    Example:

    >>> output_lengths(4), output_lengths(5)
    (2, 3)
    """
    return (lengths + TIME_STRIDE - 1) // TIME_STRIDE


@keras.saving.register_keras_serializable("speech")
class FrameMask(layers.Layer):
    """Returns a mask of the frames that are not padding.

    The inputs are frames, shape (batch, time, ...), and the lengths without
    padding, shape (batch,). The output is bool, shape (batch, time).
    """

    def call(self, frames, lengths):
        return ops.arange(ops.shape(frames)[1]) < lengths[:, None]


def deep_speech(size, *, bins, symbols):
    """Returns the model.

    The inputs are a dict of `features`, shape (batch, frames, bins), and
    `lengths`, int32, shape (batch,), the numbers of frames without padding. The
    outputs are logits, shape (batch, output_lengths(frames), symbols). Symbol 0
    is CTC's blank.

    Args:
        size: `Size`.
        bins: int, number of frequencies of the spectrogram.
        symbols: int, number of characters, plus one for the blank.
    """
    features = keras.Input((None, bins), name="features")
    lengths = keras.Input((), dtype="int32", name="lengths")

    def normalized(x, mask):
        while len(mask.shape) < len(x.shape) - 1:
            mask = ops.expand_dims(mask, -1)
        return layers.BatchNormalization(momentum=size.momentum, epsilon=1e-5)(
            x, mask=mask
        )

    def convolution(x, mask, kernel, strides):
        x = normalized(x, mask)
        x = x * ops.cast(mask[:, :, None, None], x.dtype)
        # padding="same" would pad the left side by the parity of the time.
        x = layers.ZeroPadding2D([(k // 2, k // 2) for k in kernel])(x)
        x = layers.Conv2D(size.filters, kernel, strides)(x)
        return layers.ReLU(max_value=20)(x)

    mask = FrameMask()(features, lengths)
    first, second = size.kernels
    x = convolution(features[..., None], mask, first, (TIME_STRIDE, 2))
    mask = FrameMask()(x, output_lengths(lengths))
    x = convolution(x, mask, second, (1, 2))
    x = layers.Reshape((-1, x.shape[2] * x.shape[3]))(x)
    for _ in range(size.recurrent_layers):
        x = layers.Bidirectional(
            layers.GRU(size.units, return_sequences=True), merge_mode="sum"
        )(normalized(x, mask), mask=mask)
    logits = layers.Dense(symbols, dtype="float32")(normalized(x, mask))
    padding = np.array([0.0] + [IMPOSSIBLE] * (symbols - 1), "float32")
    logits = ops.where(mask[:, :, None], logits, padding)
    # AdaScale: a keras.Model whose training step has micro-batches.
    return tf_adascale.Model(
        {"features": features, "lengths": lengths}, logits, name="deep_speech"
    )

"""The Transformer: encoder and decoder, normalized after each residual sum.

Reference: Vaswani et al., "Attention Is All You Need", 2017.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tf_adascale
from examples.transformer import vocabulary


class Size(NamedTuple):
    """The size of a model, with the symbols of the paper.

    Attributes:
        layers: int, N, number of layers of the encoder and of the decoder.
        width: int, d_model.
        heads: int, h.
        inner_width: int, d_ff.
        dropout: float, P_drop.
    """

    layers: int
    width: int
    heads: int
    inner_width: int
    dropout: float


BASE = Size(layers=6, width=512, heads=8, inner_width=2048, dropout=0.1)
MINIATURE = Size(layers=2, width=64, heads=4, inner_width=256, dropout=0.1)


class Attention(layers.Layer):
    """Multi-head attention without biases, section 3.2.2.

    Args:
        size: `Size`.
    """

    def __init__(self, size):
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value, self.output_projection = (
            _dense(size.width, size.width, use_bias=False) for _ in range(4)
        )

    def keys_values(self, memory):
        """Returns the keys and values to attend to.

        Args:
            memory: shape (batch, positions, width).

        Returns:
            Keys and values, each of shape (batch, positions, heads, depth).
        """
        return self._split(self.key(memory)), self._split(self.value(memory))

    def call(self, x, keys, values, mask):
        """Returns the attention of each position of x.

        Args:
            x: shape (batch, queries, width).
            keys: shape (batch, positions, heads, depth).
            values: shape (batch, positions, heads, depth).
            mask: bool, broadcast to (batch, heads, queries, positions): the
                positions that a query may attend to.

        Returns:
            Tensor of the shape of x.
        """
        attended = keras.ops.dot_product_attention(
            self._split(self.query(x)), keys, values, mask=mask
        )
        return self.output_projection(tf.reshape(attended, tf.shape(x)))

    def _split(self, x):
        shape = tf.shape(x)
        depth = x.shape[-1] // self.heads
        return tf.reshape(x, [shape[0], shape[1], self.heads, depth])


class FeedForward(layers.Layer):
    """Two dense layers at every position, section 3.3.

    Args:
        size: `Size`.
    """

    def __init__(self, size):
        super().__init__()
        self.inner = _dense(size.width, size.inner_width, activation="relu")
        self.outer = _dense(size.inner_width, size.width)

    def call(self, x):
        """Returns a tensor of the shape of x, (batch, positions, width)."""
        return self.outer(self.inner(x))


class Residual(layers.Layer):
    """Adds the output of a sublayer and normalizes the sum, section 3.1.

    Args:
        size: `Size`.
    """

    def __init__(self, size):
        super().__init__()
        self.dropout = layers.Dropout(size.dropout)
        self.norm = layers.LayerNormalization(epsilon=1e-6)
        self.norm.build((None, None, size.width))

    def call(self, x, update, training=None):
        """Returns LayerNorm(x + Dropout(update))."""
        return self.norm(x + self.dropout(update, training=training))


class EncoderLayer(layers.Layer):
    """Self-attention and feed-forward.

    Args:
        size: `Size`.
    """

    def __init__(self, size):
        super().__init__()
        self.attention = Attention(size)
        self.feed_forward = FeedForward(size)
        self.residual_1 = Residual(size)
        self.residual_2 = Residual(size)

    def call(self, x, mask, training=None):
        """Returns a tensor of the shape of x, (batch, positions, width)."""
        attended = self.attention(x, *self.attention.keys_values(x), mask)
        x = self.residual_1(x, attended, training=training)
        return self.residual_2(x, self.feed_forward(x), training=training)


class DecoderLayer(layers.Layer):
    """Causal self-attention, attention to the source, and feed-forward.

    Args:
        size: `Size`.
    """

    def __init__(self, size):
        super().__init__()
        self.self_attention = Attention(size)
        self.source_attention = Attention(size)
        self.feed_forward = FeedForward(size)
        self.residual_1 = Residual(size)
        self.residual_2 = Residual(size)
        self.residual_3 = Residual(size)

    def call(self, x, past, mask, source, source_mask, training=None):
        """Returns a tensor of the shape of x, and the past including x.

        Args:
            x: shape (batch, positions, width), the positions after the past.
            past: keys and values of earlier positions, see `Attention`.
            mask: bool, broadcast to (batch, heads, positions, past and x).
            source: keys and values of the source.
            source_mask: bool, broadcast to (batch, heads, positions, source).
            training: bool.
        """
        present = self.self_attention.keys_values(x)
        past = [tf.concat(pair, axis=1) for pair in zip(past, present)]
        attended = self.self_attention(x, *past, mask)
        x = self.residual_1(x, attended, training=training)
        attended = self.source_attention(x, *source, source_mask)
        x = self.residual_2(x, attended, training=training)
        x = self.residual_3(x, self.feed_forward(x), training=training)
        return x, past


# AdaScale: a keras.Model whose training step has micro-batches.
class Transformer(tf_adascale.Model):
    """A Transformer with one embedding for source, target and softmax.

    Training reads all positions of the target at once. Translation calls
    `encode` once and then `decode` for one position at a time, with the keys
    and values of the past that the last call returned. Both compute the same.

    Args:
        size: `Size`.
        vocabulary_size: int, tokens of both languages.
    """

    def __init__(self, size, *, vocabulary_size):
        super().__init__(name="transformer")
        self.size = size
        self.embedding = layers.Embedding(
            vocabulary_size,
            size.width,
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=size.width**-0.5
            ),
        )
        self.embedding.build()
        self.dropout = layers.Dropout(size.dropout)
        self.encoder = [EncoderLayer(size) for _ in range(size.layers)]
        self.decoder = [DecoderLayer(size) for _ in range(size.layers)]
        # `tf.train.Checkpoint` does not track layers in lists.
        for number, (encoder, decoder) in enumerate(
            zip(self.encoder, self.decoder)
        ):
            setattr(self, f"encoder_{number}", encoder)
            setattr(self, f"decoder_{number}", decoder)
        self.built = True

    def call(self, inputs, training=None):
        """Returns the logits of each next token of the target.

        Args:
            inputs: dict of int32 tensors of shape (batch, length), "source" and
                "target", see `batches.train_dataset`.
            training: bool, whether to apply dropout.

        Returns:
            float32, shape (batch, length, vocabulary).
        """
        source = self.encode(inputs["source"], training=training)
        logits, _ = self.decode(
            inputs["target"],
            self.no_past(tf.shape(inputs["target"])[0]),
            source,
            training=training,
        )
        return logits

    def encode(self, source, training=None):
        """Returns the encoded source for the decoder's attention.

        Args:
            source: int32, shape (batch, length).
            training: bool.

        Returns:
            Tuple of the keys and values for each layer of the decoder, and a
            mask that is False in the padding.
        """
        mask = (source != vocabulary.PADDING)[:, tf.newaxis, tf.newaxis]
        x = self._embedded(source, 0, training=training)
        for layer in self.encoder:
            x = layer(x, mask, training=training)
        return [
            layer.source_attention.keys_values(x) for layer in self.decoder
        ], mask

    def no_past(self, batch):
        """Returns the past of the first position: it is empty."""
        depth = self.size.width // self.size.heads
        nothing = tf.zeros(
            [batch, 0, self.size.heads, depth], self.compute_dtype
        )
        return [[nothing, nothing] for _ in self.decoder]

    def decode(self, target, past, source, training=None):
        """Returns the logits of the next tokens, and the past including them.

        Args:
            target: int32, shape (batch, positions).
            past: for each layer, keys and values of earlier positions.
            source: see `encode`.
            training: bool.

        Returns:
            float32 of shape (batch, positions, vocabulary), and the past.
        """
        keys_values, source_mask = source
        first = tf.shape(past[0][0])[1]
        x = self._embedded(target, first, training=training)
        positions = tf.range(first + tf.shape(target)[1])
        mask = positions <= positions[first:, tf.newaxis]  # Causal.
        mask = mask[tf.newaxis, tf.newaxis]
        presents = []
        for layer, before, values in zip(self.decoder, past, keys_values):
            x, present = layer(
                x, before, mask, values, source_mask, training=training
            )
            presents.append(present)
        weights = tf.cast(self.embedding.embeddings, x.dtype)
        logits = tf.einsum("btd,vd->btv", x, weights)
        return tf.cast(logits, tf.float32), presents

    def _embedded(self, ids, first, *, training):
        """Returns embeddings plus positions, where `first` is the first one."""
        x = self.embedding(ids) * self.size.width**0.5
        positions = tf.range(first, first + tf.shape(ids)[1])
        x += tf.cast(sinusoids(positions, self.size.width), x.dtype)
        return self.dropout(x, training=training)


def sinusoids(positions, width):
    """Returns the encoding of positions, section 3.5.

        PE(p, 2i) = sin(p / 10000^(2i / width)),  PE(p, 2i + 1) = cos(same)

    All sines come before all cosines, which only permutes the columns.

    Args:
        positions: int, shape (positions,).
        width: int, even.

    Returns:
        float32, shape (positions, width).

    Example:

    >>> sinusoids(tf.constant([0, 1]), 2).numpy().round(4).tolist()
    [[0.0, 1.0], [0.8414999842643738, 0.5403000116348267]]
    """
    wavelengths = 10_000 ** (np.arange(0, width, 2, np.float32) / width)
    angles = tf.cast(positions, tf.float32)[:, tf.newaxis] / wavelengths
    return tf.concat([tf.sin(angles), tf.cos(angles)], axis=1)


class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross entropy with smoothed labels, averaged without the padding.

        q(token) = (1 - smoothing) [token = label] + smoothing / vocabulary

    Args:
        smoothing: float in [0, 1), epsilon_ls of Vaswani et al., section 5.4.
    """

    def __init__(self, smoothing=0.1, name="smoothed_cross_entropy"):
        super().__init__(name=name)
        self.smoothing = smoothing

    def call(self, y_true, y_pred):
        """Returns a scalar.

        Args:
            y_true: int, shape (batch, length).
            y_pred: logits, shape (batch, length, vocabulary).
        """
        y_true, y_pred = tf.cast(y_true, tf.int32), tf.cast(y_pred, tf.float32)
        log_normalizer = tf.reduce_logsumexp(y_pred, axis=-1)
        of_label = tf.gather(y_pred, y_true, batch_dims=2)
        mean = tf.reduce_mean(y_pred, axis=-1)
        losses = (
            log_normalizer
            - (1 - self.smoothing) * of_label
            - self.smoothing * mean
        )
        is_token = tf.cast(y_true != vocabulary.PADDING, tf.float32)
        return tf.reduce_sum(losses * is_token) / tf.reduce_sum(is_token)


def _dense(inputs, outputs, **kwargs):
    """Returns a built dense layer with Glorot initialization."""
    layer = layers.Dense(outputs, **kwargs)
    layer.build((None, None, inputs))
    return layer

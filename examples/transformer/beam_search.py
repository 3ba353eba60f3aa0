"""Beam search for translations."""

import tensorflow as tf

from examples.transformer import vocabulary

# Maximum length of a translation minus that of its source, Vaswani et al., 6.1.
MORE_THAN_SOURCE = 50


def translated(model, source, *, beams=4, alpha=0.6):
    """Returns translations of sentences.

    The score of a translation is its log probability / ((5 + length) / 6)^alpha
    (Wu et al., 2016, equation (14)). The search ends when no unfinished
    translation can exceed the best finished score.

    Args:
        model: `model.Transformer`.
        source: int32, shape (batch, length).
        beams: int, number of unfinished translations to keep per sentence.
        alpha: float, exponent of the length penalty.

    Returns:
        int32, shape (batch, any length). Translations end with
        `vocabulary.END`, followed by padding.
    """
    batch = tf.shape(source)[0]
    longest = tf.shape(source)[1] + MORE_THAN_SOURCE
    # One row per beam. The rows of a sentence are consecutive.
    keys_values, mask = model.encode(source)
    memory = tf.nest.map_structure(
        lambda x: tf.repeat(x, beams, axis=0), (keys_values, mask)
    )
    lowest = tf.float32.min

    def penalty(length):
        return ((5 + tf.cast(length, tf.float32)) / 6) ** alpha

    def is_open(length, sequences, scores, past, finished, finished_scores):
        # Log probabilities only fall, and this is the largest divisor.
        best = scores[:, 0] / penalty(longest)
        return (length < longest) & tf.reduce_any(best > finished_scores[:, 0])

    def step(length, sequences, scores, past, finished, finished_scores):
        last = tf.reshape(sequences[:, :, -1], [-1, 1])
        logits, past = model.decode(last, past, memory)
        size = logits.shape[-1]
        scores = scores[..., tf.newaxis] + tf.reshape(
            tf.nn.log_softmax(logits), [batch, beams, size]
        )
        # At most half of the best 2 * beams can end, one per beam.
        scores, indices = tf.math.top_k(
            tf.reshape(scores, [batch, -1]), 2 * beams
        )
        parents, tokens = indices // size, indices % size
        sequences = tf.concat(
            [
                tf.gather(sequences, parents, batch_dims=1),
                tokens[..., tf.newaxis],
            ],
            axis=2,
        )
        length += 1
        is_end = tokens == vocabulary.END

        finished = tf.concat(
            [tf.pad(finished, [(0, 0), (0, 0), (0, 1)]), sequences], axis=1
        )
        finished_scores, best = tf.math.top_k(
            tf.concat(
                [
                    finished_scores,
                    tf.where(is_end, scores / penalty(length), lowest),
                ],
                axis=1,
            ),
            1,
        )
        finished = tf.gather(finished, best, batch_dims=1)

        scores, alive = tf.math.top_k(tf.where(is_end, lowest, scores), beams)
        sequences = tf.gather(sequences, alive, batch_dims=1)
        rows = tf.reshape(
            tf.gather(parents, alive, batch_dims=1)
            + beams * tf.range(batch)[:, tf.newaxis],
            [-1],
        )
        past = tf.nest.map_structure(lambda x: tf.gather(x, rows), past)
        return length, sequences, scores, past, finished, finished_scores

    past = model.no_past(batch * beams)
    start = (
        tf.constant(0),
        tf.fill([batch, beams, 1], vocabulary.START),
        # All beams start equal, so only the first one counts.
        tf.tile([[0.0] + [lowest] * (beams - 1)], [batch, 1]),
        past,
        tf.fill([batch, 1, 1], vocabulary.PADDING),
        tf.fill([batch, 1], lowest),
    )
    _, sequences, _, _, finished, finished_scores = tf.while_loop(
        is_open,
        step,
        start,
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None, beams, None]),
            tf.TensorShape([None, beams]),
            tf.nest.map_structure(
                lambda x: tf.TensorShape([None, None, *x.shape[2:]]), past
            ),
            tf.TensorShape([None, 1, None]),
            tf.TensorShape([None, 1]),
        ),
    )
    is_finished = finished_scores > lowest
    best = tf.where(is_finished, finished[:, 0], sequences[:, 0])
    return best[:, 1:]  # Without START.

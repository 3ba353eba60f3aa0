"""Dynamic batching: as many sentence pairs as a number of tokens has room for.

Pairs of like length share a bucket and are padded to its length L. A base batch
of `tokens` tokens is tokens // L pairs of one bucket; a step at scale S takes S
times as many, of one bucket too, as tensor2tensor does, so that it divides into
S equal micro-batches, each a base batch.
"""

import itertools

import numpy as np
import tensorflow as tf

from examples import streams
from examples.transformer import vocabulary


def bucket_lengths(longest, *, shortest=8, growth=1.25):
    """Returns the lengths that pairs are padded to.

    They are few, as each is a shape that XLA compiles for, and near enough to
    one another that little is padding.

    Args:
        longest: int, the last of them.
        shortest: int, the first of them.
        growth: number > 1, at least the quotient of two neighbors.

    Returns:
        List of int.

    Example:

    >>> bucket_lengths(256)
    [8, 10, 13, 17, 22, 28, 35, 44, 55, 69, 87, 109, 137, 172, 215, 256]
    """
    lengths = [shortest]
    while lengths[-1] < longest:
        lengths.append(min(int(np.ceil(growth * lengths[-1])), longest))
    return lengths


def plan(lengths, *, buckets, tokens, scale, seed, number):
    """Returns the steps of one pass over the pairs.

    Every pair is used once, in an order that (seed, number) decides. What a
    bucket has left that is no step is padded to the next bucket's length; what
    the last has left is not used in this pass. The number of steps is the same
    in every pass.

    Args:
        lengths: int, shape (pairs,): tokens of the longer sentence of a pair.
        buckets: list of int, see `bucket_lengths`.
        tokens: int, tokens of a base batch, padding included.
        scale: int, base batches of a step.
        seed: int.
        number: int, of the pass.

    Returns:
        List of (length that is padded to, numbers of the pairs).

    Example:

    >>> lengths = np.array([8, 3, 12, 5, 7, 11])
    >>> steps = plan(lengths, buckets=[8, 16], tokens=16, scale=2, seed=0,
    ...              number=0)
    >>> for length, rows in sorted(steps, key=lambda step: step[0]):
    ...     print(length, sorted(lengths[rows].tolist()))
    8 [3, 5, 7, 8]
    16 [11, 12]
    """
    generator = np.random.default_rng([seed, number])
    order = generator.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths[order])
    steps, left = [], order[:0]
    for bucket, length in enumerate(buckets):
        waiting = np.concatenate([left, order[bucket_of == bucket]])
        rows = scale * (tokens // length)
        count = len(waiting) // rows
        steps += (
            [
                (length, part)
                for part in np.split(waiting[: count * rows], count)
            ]
            if count
            else []
        )
        left = waiting[count * rows :]
    return [steps[step] for step in generator.permutation(len(steps))]


def train_dataset(
    corpus,
    batch_size,
    *,
    buckets,
    tokens,
    seed,
    start=0,
    share=streams.Share(),
):
    """Returns endless batches of a corpus: one worker's part of each.

    Batch t depends on nothing but (batch_size, seed, start) and t. To begin
    anywhere in the stream takes no longer than to begin at its start.

    Args:
        corpus: `corpus.Corpus`.
        batch_size: int, tokens of the batch of all workers, padding included: a
            multiple of `tokens`.
        buckets: list of int, see `bucket_lengths`.
        tokens: int, tokens of a base batch.
        seed: int.
        start: int, tokens already trained on: base batches times `tokens`. If
            that is no multiple of the batch, for the scale has changed, the
            pass goes on from about where it was, in another order.
        share: `streams.Share`: a worker reads some of a batch's base batches.

    Returns:
        `tf.data.Dataset` of ({"source": ids, "target": ids}, labels), int32 of
        shape (pairs, length): "target" are the labels after
        `vocabulary.START`, all are padded with `vocabulary.PADDING`.

    Raises:
        ValueError: if the batch cannot be made of base batches, the workers
            cannot share it, or a pass has not pairs enough for it.
    """
    scale = batch_size // tokens
    if scale * tokens != batch_size or scale % share.count or not scale:
        raise ValueError(
            "The batch cannot be made of base batches, as many for each "
            f"worker. Expected a multiple of {tokens} * {share.count} tokens. "
            f"Received: batch_size={batch_size}, share={share}"
        )
    lengths = corpus.lengths.max(axis=1)

    def steps(number):
        return plan(
            lengths,
            buckets=buckets,
            tokens=tokens,
            scale=scale,
            seed=seed,
            number=number,
        )

    steps_per_pass = len(steps(0))
    if not steps_per_pass:
        raise ValueError(
            "There are not enough sentence pairs for a batch. Expected pairs "
            f"for {batch_size} tokens. Received: pairs={len(lengths)}"
        )
    first_pass, first_step = divmod(start // batch_size, steps_per_pass)

    def batches():
        for number in itertools.count(first_pass):
            first = first_step if number == first_pass else 0
            for length, rows in steps(number)[first:]:
                mine = np.split(rows, share.count)[share.index]
                labels = _padded(corpus, 2 * mine + 1, length)
                yield (
                    {
                        "source": _padded(corpus, 2 * mine, length),
                        "target": _shifted(labels),
                    },
                    labels,
                )

    ids = tf.TensorSpec((None, None), tf.int32)
    return tf.data.Dataset.from_generator(
        batches, output_signature=({"source": ids, "target": ids}, ids)
    ).prefetch(tf.data.AUTOTUNE)


def test_dataset(sources, references, batch_size, *, buckets):
    """Returns sentences to translate with their translations, in batches.

    Sentences of like length share a batch of at most `batch_size` tokens; a
    batch has the references of its own sentences.

    Args:
        sources: list of lists of int, token ids.
        references: list of str.
        batch_size: int.
        buckets: list of int, see `bucket_lengths`.

    Returns:
        `tf.data.Dataset` of (int32 of shape (sentences, length), strings of
        shape (sentences,)).
    """
    lengths = np.array([len(source) for source in sources])
    order = np.argsort(lengths, kind="stable")
    bucket_of = np.searchsorted(buckets, lengths[order])

    def batches():
        for bucket, length in enumerate(buckets):
            rows = order[bucket_of == bucket]
            size = max(1, batch_size // length)
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                ids = np.full((len(part), length), vocabulary.PADDING, np.int32)
                for row, index in zip(ids, part):
                    row[: lengths[index]] = sources[index]
                yield ids, [references[index] for index in part]

    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None,), tf.string),
        ),
    ).prefetch(tf.data.AUTOTUNE)


def _padded(corpus, sentences, length):
    """Returns sentences of a corpus, padded to a length: int32."""
    starts = corpus.bounds[sentences][:, np.newaxis]
    ends = corpus.bounds[sentences + 1][:, np.newaxis]
    places = starts + np.arange(length)
    tokens = corpus.tokens[np.minimum(places, len(corpus.tokens) - 1)]
    return np.where(places < ends, tokens, vocabulary.PADDING).astype(np.int32)


def _shifted(labels):
    """Returns what the decoder reads: at each place the label before it."""
    shifted = np.roll(labels, 1, axis=1)
    shifted[:, 0] = vocabulary.START
    return shifted

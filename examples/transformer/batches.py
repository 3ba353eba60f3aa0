"""Dynamic batching: batches of a number of tokens, not of sentence pairs.

Pairs of similar length share a bucket and are padded to its length L. A base
batch of `tokens` tokens is tokens // L pairs of one bucket. A step at scale S
takes S times as many pairs, also of one bucket, like tensor2tensor. So it
divides into S equal micro-batches, each of them a base batch.
"""

import itertools

import numpy as np
import tensorflow as tf

from examples.common.data import streams
from examples.transformer import vocabulary


def bucket_lengths(longest, *, shortest=8, growth=1.25):
    """Returns the lengths that pairs are padded to.

    Few lengths mean few compilations by XLA. A small growth means little
    padding.

    Args:
        longest: int, the last length.
        shortest: int, the first length.
        growth: number > 1, ratio of successive lengths, which are rounded up.

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

    Each pair is used at most once, in an order that depends on (seed, number).
    Pairs of a bucket that do not fill a step move to the next bucket. Pairs
    that are left in the last bucket are not used in this pass. The number of
    steps is the same in every pass.

    Args:
        lengths: int, shape (pairs,), tokens of the longer sentence of a pair.
        buckets: list of int, see `bucket_lengths`.
        tokens: int, tokens of a base batch, including padding.
        scale: int, base batches per step.
        seed: int.
        number: int, number of the pass.

    Returns:
        List of (padded length, indices of the pairs).

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
    """Returns one worker's part of endless batches of a corpus.

    Batch t depends only on (batch_size, seed, start) and t. Starting at any
    position of the stream takes the same time.

    Args:
        corpus: `corpus.Corpus`.
        batch_size: int, tokens per batch of all workers, including padding. A
            multiple of `tokens`.
        buckets: list of int, see `bucket_lengths`.
        tokens: int, tokens of a base batch.
        seed: int.
        start: int, tokens already trained on: base batches times `tokens`. If
            this is not a multiple of the batch size because the scale has
            changed, the pass continues near its position in another order.
        share: `streams.Share`. A worker reads whole base batches.

    Returns:
        `tf.data.Dataset` of ({"source": ids, "target": ids}, labels), int32 of
        shape (pairs, length). "target" is `vocabulary.START` followed by the
        labels without the last. All are padded with `vocabulary.PADDING`.

    Raises:
        ValueError: if `batch_size` is not a multiple of the base batches of all
            workers, or the corpus is too small for a batch.
    """
    scale = batch_size // tokens
    if scale * tokens != batch_size or scale % share.count or not scale:
        raise ValueError(
            f"`batch_size` must be a multiple of {tokens} * {share.count} "
            "tokens: each worker takes as many base batches. "
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
            f"`corpus` must have enough sentence pairs for {batch_size} "
            f"tokens. Received: pairs={len(lengths)}"
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
    """Returns batches of sentences to translate and their translations.

    Sentences of similar length share a batch of at most `batch_size` tokens.

    Args:
        sources: list of lists of int, token ids.
        references: list of str.
        batch_size: int, tokens per batch.
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
    """Returns sentences of a corpus as int32, padded to a length."""
    starts = corpus.bounds[sentences][:, np.newaxis]
    ends = corpus.bounds[sentences + 1][:, np.newaxis]
    indices = starts + np.arange(length)
    tokens = corpus.tokens[np.minimum(indices, len(corpus.tokens) - 1)]
    return np.where(indices < ends, tokens, vocabulary.PADDING).astype(np.int32)


def _shifted(labels):
    """Returns the decoder's input: at each position, the previous label."""
    shifted = np.roll(labels, 1, axis=1)
    shifted[:, 0] = vocabulary.START
    return shifted

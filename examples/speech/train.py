"""Trains Deep Speech 2 on LibriSpeech, or a small one on digit words.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020: speech, tables 1 to 3 and B.4.3

Miniature, no download:

Command:  python -m examples.speech.train --algorithm=adascale --scale=16
Hardware: 2 CPU cores
Time:     8 minutes on a busy machine; 51 seconds with --algorithm=identity
          --scale=1 on an idle one
Metric:   word accuracy (1 - word error rate) on the speakers of the test split:
          98 %; 99 to 100 % with --algorithm=identity --scale=1

Full size, the paper's model and data:

Command:  python -m examples.common.data.prepared librispeech --data_dir=DIR
          python -m examples.speech.train --data=tfds --data_dir=DIR --scale=8
Hardware: a GPU, or several with --strategy=mirrored
Metric:   word accuracy on dev-clean: 79.6 % in the paper at S = 1
"""

import jiwer
import keras
import tensorflow as tf
from absl import app
from absl import flags as absl_flags

from examples.common import data_flags, flags, inference, training
from examples.speech import data as sources
from examples.speech import model

# Learning rate of the last step / that of the first.
DECAY = 0.05

_SECONDS = absl_flags.DEFINE_float(
    "seconds",
    17.0,
    "Length of the recordings that the full size is trained on: longer ones "
    "are dropped, shorter ones are padded.",
    lower_bound=0.1,
)


def task(
    *,
    data="embedded",
    data_dir=None,
    split="test",
    learning_rate=None,
    seconds=17.0,
    test_seconds=35.0,
):
    """Returns the benchmark as a `training.Task`.

    Args:
        data: str, "embedded" for the miniature or "tfds" for the full size.
        data_dir: str, directory in which LibriSpeech was prepared.
        split: str, "test" or "validation", the data to test on.
        learning_rate: float, of the first step at the base batch. Default: the
            paper's 0.0014, or 0.006 for the miniature.
        seconds: float, see `sources.librispeech`.
        test_seconds: float, see `sources.librispeech`.

    Raises:
        ValueError: if `data` or `split` is unknown.
    """
    name = data_flags.task_name("speech", data=data, split=split)
    validation = split == "validation"
    if data == "tfds":
        source = sources.librispeech(
            data_dir=data_dir,
            validation=validation,
            seconds=seconds,
            test_seconds=test_seconds,
        )
        size, base_batch, total_steps, rate = model.FULL, 32, 84_800, 1.4e-3
    else:
        source = sources.digits(validation=validation)
        size, base_batch, total_steps, rate = model.MINIATURE, 8, 1200, 6e-3
    rate = rate if learning_rate is None else learning_rate
    return training.Task(
        name=name,
        base_batch=base_batch,
        total_steps=total_steps,
        schedule=lambda total_steps: (
            keras.optimizers.schedules.ExponentialDecay(
                rate, decay_steps=total_steps, decay_rate=DECAY
            )
        ),
        optimizer=lambda schedule: keras.optimizers.SGD(
            schedule, momentum=0.9, global_clipnorm=100.0
        ),
        model=lambda: model.deep_speech(
            size,
            bins=source.formats[0].bins,
            symbols=len(sources.CHARACTERS) + 1,
        ),
        train_dataset=source.train_dataset,
        test_dataset=source.test_dataset,
        loss=keras.losses.CTC,
        metrics=list,
        metric="word_accuracy",
        evaluate=evaluate,
    )


def evaluate(network, dataset):
    """Returns the loss and the word accuracy of greedy decoding.

    Args:
        network: Keras model from examples to logits.
        dataset: `tf.data.Dataset` of batches of `sources.examples`.

    Returns:
        dict from "loss" and "word_accuracy" to floats.
    """
    loss = tf.function(keras.losses.ctc, reduce_retracing=True)
    losses, references, hypotheses = [], [], []
    for (_, labels), logits in inference.predictions(network, dataset):
        losses.extend(loss(labels, logits).numpy())
        references += map(sources.decode, labels.numpy())
        hypotheses += transcripts(logits)
    return {
        "loss": float(sum(losses) / len(losses)),
        "word_accuracy": word_accuracy(references, hypotheses),
    }


def transcripts(logits):
    """Returns the texts of greedy decoding.

    Args:
        logits: float, shape (batch, time, symbols). In the padding the blank
            has the largest logit, so padding adds no text.

    Returns:
        list of str.
    """
    batch, time, _ = logits.shape
    decoded, _ = keras.ops.ctc_decode(logits, [time] * batch, mask_index=0)
    return [sources.decode(symbols) for symbols in decoded[0].numpy()]


def word_accuracy(references, hypotheses):
    """Returns 1 - word error rate, or 0 if there are more errors than words.

    Args:
        references: list of non-empty str.
        hypotheses: list of str.

    Example:

    >>> word_accuracy(["one two", "six six"], ["one too", "six six"])
    0.75
    """
    return max(0.0, 1.0 - jiwer.wer(references, hypotheses))


def main(_):
    """Trains with the settings of the flags."""
    training.run(
        task(
            **data_flags.values(),
            **flags.overrides(),
            seconds=_SECONDS.value,
        ),
        flags.settings(),
    )


if __name__ == "__main__":
    app.run(main)

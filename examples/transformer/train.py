"""Trains a Transformer on WMT14 English to German, or on numbers in words.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020: transformer, appendix B.4.4
Command:  python -m examples.transformer.train --algorithm=adascale --scale=16
Hardware: 2 CPU cores
Time:     3 minutes; 54 seconds with --algorithm=identity --scale=1
Metric:   BLEU on the test split: 97 to 98 for both

Full size:

Command:  python -m examples.prepared wmt14_translate/de-en --data_dir=DIRECTORY
          python -m examples.transformer.train --data=tfds \
              --data_dir=DIRECTORY --strategy=mirrored --scale=16
Hardware: GPUs
Metric:   BLEU on newstest2014, by sacrebleu: cased, tokenizer 13a
"""

from typing import NamedTuple

import keras
import sacrebleu
import tensorflow as tf
from absl import app
from absl import flags as absl_flags

from examples import data_flags, flags, training
from examples.transformer import beam_search, model, vocabulary
from examples.transformer import data as sources

CACHE_DIR = "out/transformer/cache"

# Where the learning rate falls, as a fraction of the steps.
MILESTONE = 1_440_000 / 1_550_000
DECAY = 0.1
LABEL_SMOOTHING = 0.1


class Recipe(NamedTuple):
    """How a model of one size is trained.

    Attributes:
        total_steps: int, T_1.
        learning_rate: float, of the first step at the base batch.
        momentum: float.
    """

    total_steps: int
    learning_rate: float
    momentum: float


FULL = Recipe(total_steps=1_550_000, learning_rate=0.01, momentum=0.99)
# The paper's momentum remembers 100 steps. At S = 16 the miniature takes few
# times as many altogether: it would end before it forgets how it began.
MINIATURE = Recipe(total_steps=6000, learning_rate=0.01, momentum=0.9)

_CACHE_DIR = absl_flags.DEFINE_string(
    "cache_dir",
    CACHE_DIR,
    "Where the vocabulary and the encoded sentences of --data=tfds are kept.",
)


def task(
    *,
    data="embedded",
    data_dir=None,
    split="test",
    learning_rate=None,
    cache_dir=CACHE_DIR,
    size=sources.FULL,
):
    """Returns the benchmark as a `training.Task`.

    "Examples" are tokens here: the batch sizes count them, padding included.

    Args:
        data: str, "embedded" for the miniature or "tfds" for the full size.
        data_dir: str, where tensorflow-datasets has WMT prepared.
        split: str, "test" or "validation", what is tested on.
        learning_rate: float, of the first step; by default the recipe's.
        cache_dir: str, where the vocabulary and the sentences of "tfds" are
            kept once they are encoded.
        size: `data.Size` of "tfds", for data smaller than WMT.

    Raises:
        ValueError: if data or split are none of these.
    """
    name = data_flags.task_name("transformer", data=data, split=split)
    if data == "tfds":
        source = sources.wmt(
            data_dir=data_dir, split=split, size=size, cache_dir=cache_dir
        )
        recipe, model_size = FULL, model.BASE
    else:
        source = sources.numbers(split=split)
        recipe, model_size = MINIATURE, model.MINIATURE
    if learning_rate is None:
        learning_rate = recipe.learning_rate
    return training.Task(
        name=name,
        base_batch=source.size.tokens,
        total_steps=recipe.total_steps,
        schedule=lambda total_steps: (
            keras.optimizers.schedules.PiecewiseConstantDecay(
                [round(MILESTONE * total_steps)],
                [learning_rate, DECAY * learning_rate],
            )
        ),
        optimizer=lambda schedule: keras.optimizers.SGD(
            schedule, momentum=recipe.momentum
        ),
        model=lambda: model.Transformer(
            model_size, vocabulary_size=source.vocabulary_size
        ),
        train_dataset=source.train_dataset,
        test_dataset=source.test_dataset,
        loss=lambda: model.SmoothedCrossEntropy(LABEL_SMOOTHING),
        metrics=list,
        metric="bleu",
        evaluate=lambda transformer, dataset: evaluate(
            transformer, dataset, tokenizer=source.tokenizer
        ),
    )


def evaluate(transformer, dataset, *, tokenizer):
    """Returns the BLEU of a model's translations, in [0, 100].

    Args:
        transformer: `model.Transformer`.
        dataset: `tf.data.Dataset`, see `batches.test_dataset`.
        tokenizer: `tokenizers.Tokenizer`.

    Returns:
        Dict with "bleu".
    """
    translate = tf.function(
        lambda ids: beam_search.translated(transformer, ids),
        input_signature=[tf.TensorSpec((None, None), tf.int32)],
    )
    translations, references = [], []
    for ids, texts in dataset:
        translations += vocabulary.decoded(tokenizer, translate(ids).numpy())
        references += [text.decode() for text in texts.numpy()]
    bleu = sacrebleu.corpus_bleu(translations, [references])
    return {"bleu": bleu.score}


def main(_):
    """Trains as the flags say."""
    training.run(
        task(
            **data_flags.values(),
            **flags.overrides(),
            cache_dir=_CACHE_DIR.value,
        ),
        flags.settings(),
    )


if __name__ == "__main__":
    app.run(main)

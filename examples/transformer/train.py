r"""Trains a Transformer on WMT14 English to German, or on numbers in words.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020: transformer, appendix B.4.4

Miniature, no download:

Command:  python -m examples.transformer.train --algorithm=adascale --scale=16
Hardware: 2 CPU cores
Time:     3 minutes; 54 seconds with --algorithm=identity --scale=1
Metric:   BLEU on the test split: 97 to 98 for both

Miniature with AdamW:

Command:  python -m examples.transformer.train --optimizer=adamw \
              --algorithm=adamscale --scale=32
Hardware: 2 CPU cores
Time:     1.5 minutes; 52 seconds with --algorithm=identity --scale=1
Metric:   BLEU on the test split: see docs/results.md

Full size, the paper's model and data:

Command:  python -m examples.common.data.prepared wmt14_translate/de-en \
              --data_dir=DIR
          python -m examples.transformer.train --data=tfds --data_dir=DIR \
              --strategy=mirrored --scale=16
Hardware: GPUs
Metric:   BLEU on newstest2014, by sacrebleu: cased, tokenizer 13a
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import sacrebleu
import tensorflow as tf
from absl import app
from absl import flags as absl_flags

from examples.common import data_flags, flags, training
from examples.transformer import beam_search, model, vocabulary
from examples.transformer import data as sources

CACHE_DIR = "out/transformer/cache"

# Fraction of the steps after which the learning rate of SGD falls, and factor.
MILESTONE = 1_440_000 / 1_550_000
DECAY = 0.1
# Fraction of the steps in which the learning rate of AdamW rises.
WARMUP = 0.1
LABEL_SMOOTHING = 0.1


def step_decay(learning_rate, total_steps):
    """Returns the paper's schedule, stretched to a number of steps."""
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(MILESTONE * total_steps)],
        [learning_rate, DECAY * learning_rate],
    )


def warmed_up_cosine(learning_rate, total_steps):
    """Returns a linear warm-up to the rate, then a cosine decay to 0."""
    warmup_steps = round(WARMUP * total_steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=total_steps - warmup_steps,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )


def adamw(schedule):
    """Returns AdamW with weight decay of kernels and embeddings."""
    # beta_2 is that of Vaswani et al., 2017, which averages 50 steps. Keras's
    # 0.999 averages more steps than the miniature takes at S = 32.
    optimizer = keras.optimizers.AdamW(schedule, beta_2=0.98, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


class Recipe(NamedTuple):
    """The hyper-parameters of one size with one optimizer.

    Attributes:
        total_steps: int, T_1.
        learning_rate: float, at the base batch: that of the first step of SGD,
            or the highest one of AdamW.
        schedule: callable, (learning_rate, total_steps) to a
            `LearningRateSchedule`.
        optimizer: callable, schedule to a new Keras optimizer.
    """

    total_steps: int
    learning_rate: float
    schedule: Callable[[float, int], Any]
    optimizer: Callable[[Any], keras.optimizers.Optimizer]


RECIPES = {
    ("tfds", "sgd"): Recipe(
        1_550_000,
        0.01,
        step_decay,
        functools.partial(keras.optimizers.SGD, momentum=0.99),
    ),
    # The paper's momentum of 0.99 averages 100 steps. That is too long for the
    # few hundred steps of the miniature at S = 16.
    ("embedded", "sgd"): Recipe(
        6000,
        0.01,
        step_decay,
        functools.partial(keras.optimizers.SGD, momentum=0.9),
    ),
    ("embedded", "adamw"): Recipe(4000, 0.001, warmed_up_cosine, adamw),
}
OPTIMIZERS = ("sgd", "adamw")

_OPTIMIZER = absl_flags.DEFINE_enum(
    "optimizer",
    OPTIMIZERS[0],
    OPTIMIZERS,
    "sgd: the paper's SGD with momentum. adamw: AdamW, for the miniature only.",
)
_CACHE_DIR = absl_flags.DEFINE_string(
    "cache_dir",
    CACHE_DIR,
    "Directory in which --data=tfds caches the vocabulary and the encoded "
    "sentences.",
)


def task(
    *,
    data="embedded",
    data_dir=None,
    split="test",
    optimizer=OPTIMIZERS[0],
    learning_rate=None,
    cache_dir=CACHE_DIR,
    size=sources.FULL,
):
    """Returns the benchmark as a `training.Task`.

    Batch sizes count tokens, including padding, instead of examples.

    Args:
        data: str, "embedded" for the miniature or "tfds" for the full size.
        data_dir: str, directory in which WMT was prepared.
        split: str, "test" or "validation", the data to test on.
        optimizer: str, one of `OPTIMIZERS`. "adamw" is for the miniature only.
        learning_rate: float. Default: that of the recipe.
        cache_dir: str, directory in which "tfds" caches the vocabulary and the
            encoded sentences.
        size: `data.Size` of "tfds", for data smaller than WMT.

    Raises:
        ValueError: if `data` or `split` is unknown, or there is no recipe for
            the optimizer.
    """
    name = data_flags.task_name("transformer", data=data, split=split)
    recipe = RECIPES.get((data, optimizer))
    if recipe is None:
        raise ValueError(
            f"`data` and `optimizer` must be one of {tuple(RECIPES)}. "
            f"Received: data={data!r}, optimizer={optimizer!r}"
        )
    if optimizer != OPTIMIZERS[0]:
        name = f"{name}-{optimizer}"
    if data == "tfds":
        source = sources.wmt(
            data_dir=data_dir, split=split, size=size, cache_dir=cache_dir
        )
        model_size = model.BASE
    else:
        source = sources.numbers(split=split)
        model_size = model.MINIATURE
    if learning_rate is None:
        learning_rate = recipe.learning_rate
    return training.Task(
        name=name,
        base_batch=source.size.tokens,
        total_steps=recipe.total_steps,
        schedule=lambda total_steps: recipe.schedule(
            learning_rate, total_steps
        ),
        optimizer=recipe.optimizer,
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
    """Trains with the settings of the flags."""
    training.run(
        task(
            **data_flags.values(),
            **flags.overrides(),
            optimizer=_OPTIMIZER.value,
            cache_dir=_CACHE_DIR.value,
        ),
        flags.settings(),
    )


if __name__ == "__main__":
    app.run(main)

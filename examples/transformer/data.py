"""English to German sentence pairs: WMT 2014, or numbers in words.

The sentences of the miniature are lists of one to three numbers in words, made
by num2words: "four hundred and twelve, seven" becomes "vierhundertzwölf,
sieben". German writes a number as one word, with the units before the tens, so
the model must compose and reorder pieces. BLEU counts whole words and sequences
of up to four words, so a number with one wrong letter is a wrong word.
"""

import functools
from typing import NamedTuple

import numpy as np
from absl import logging
from num2words import num2words

from examples.common.data import prepared, streams
from examples.transformer import batches, corpus, vocabulary

# Smaller numbers contain all the words of English and German numbers. They are
# always trained on, and the test numbers are composed of them.
FIRST_COMPOSED = 101
LAST = 9999
HELD_OUT = 900
TRAIN_SENTENCES = 20_000
TEST_SENTENCES = 300
_SPLIT_SEED = 0

WMT = "wmt14_translate/de-en"


class Size(NamedTuple):
    """The size of the data.

    Attributes:
        tokens: int, tokens of a base batch, including padding.
        longest: int, maximum tokens of a sentence.
        vocabulary: int, maximum tokens of the vocabulary of both languages.
    """

    tokens: int
    longest: int
    vocabulary: int


FULL = Size(tokens=2048, longest=256, vocabulary=37_000)
# With few tokens, the gradient is noisy enough that a large batch helps.
MINIATURE = Size(tokens=128, longest=32, vocabulary=200)


class Source:
    """Sentence pairs and their preprocessing.

    The constructor reads nothing, because a strategy must be created before
    TensorFlow initializes its devices.

    Args:
        train: callable, () to `corpus.Pairs`.
        test: callable, () to `corpus.Pairs`.
        size: `Size`.
        cache_dir: str, see `corpus.prepared`.
    """

    def __init__(self, train, test, *, size, cache_dir=None):
        self.size = size
        self._train = train
        self._test = test
        self._cache_dir = cache_dir
        self._buckets = batches.bucket_lengths(size.longest)

    @functools.cached_property
    def _prepared(self):
        return corpus.prepared(
            self._train(),
            vocabulary_size=self.size.vocabulary,
            longest=self.size.longest,
            cache_dir=self._cache_dir,
        )

    @property
    def tokenizer(self):
        """`tokenizers.Tokenizer` of both languages."""
        return self._prepared[0]

    @property
    def vocabulary_size(self):
        """Int, number of tokens of the vocabulary."""
        return self.tokenizer.get_vocab_size()

    def train_dataset(
        self, batch_size, *, seed, start=0, share=streams.Share()
    ):
        """Returns endless batches of tokens, see `batches.train_dataset`."""
        return batches.train_dataset(
            self._prepared[1],
            batch_size,
            buckets=self._buckets,
            tokens=self.size.tokens,
            seed=seed,
            start=start,
            share=share,
        )

    def test_dataset(self, batch_size):
        """Returns all test sentences, see `batches.test_dataset`.

        Sentences longer than `longest` tokens are truncated, counted and
        logged. Dropping them would make the metric too good.
        """
        pairs = self._test()
        sources, references = map(list, zip(*pairs.read()))
        encoded = vocabulary.encoded(self.tokenizer, sources)
        longest = self.size.longest
        if cut := sum(len(ids) > longest for ids in encoded):
            logging.warning(
                "%s: sentences truncated to %d tokens: %d of %d",
                pairs.name,
                longest,
                cut,
                len(encoded),
            )
        return batches.test_dataset(
            [ids[:longest] for ids in encoded],
            references,
            batch_size,
            buckets=self._buckets,
        )


def wmt(*, data_dir=None, split="test", size=FULL, cache_dir=None):
    """Returns WMT 2014, English to German, as a `Source`.

    The test split is newstest2014, the validation split newstest2013.

    Args:
        data_dir: str, see `prepared.load`.
        split: str, "test" or "validation", the data to test on.
        size: `Size`.
        cache_dir: str, see `corpus.prepared`.
    """
    return Source(
        functools.partial(_wmt, "train", data_dir),
        functools.partial(_wmt, split, data_dir),
        size=size,
        cache_dir=cache_dir,
    )


def numbers(*, split="test"):
    """Returns lists of numbers in words, English to German, as a `Source`.

    No number is in more than one split. Numbers up to 100 are only trained on.

    Args:
        split: str, "test" or "validation", the data to test on.
    """
    training, tested = number_splits(split)
    return Source(
        functools.partial(_lists, "train", training, size=TRAIN_SENTENCES),
        functools.partial(_lists, split, tested, size=TEST_SENTENCES),
        size=MINIATURE,
    )


def _wmt(split, data_dir):
    """Returns a split of WMT 2014, from English to German."""
    dataset, size = prepared.load(WMT, split, data_dir=data_dir)

    def read():
        for batch in dataset.batch(corpus.CHUNK).as_numpy_iterator():
            for source, target in zip(batch["en"], batch["de"]):
                yield source.decode(), target.decode()

    return corpus.Pairs(f"{WMT}, {split}", size, read)


def number_splits(split):
    """Returns the numbers to train on and the numbers to test on.

    Numbers of the test and the validation split are never trained on.

    Args:
        split: str, "test" or "validation".

    Returns:
        Two arrays of int.

    Example:

    >>> train, test = number_splits("test")
    >>> len(train), len(test), len(set(train.tolist()) & set(test.tolist()))
    (8199, 900, 0)
    """
    composed = np.arange(FIRST_COMPOSED, LAST + 1)
    test, validation, train = np.split(
        np.random.default_rng(_SPLIT_SEED).permutation(composed),
        [HELD_OUT, 2 * HELD_OUT],
    )
    train = np.concatenate([np.arange(1, FIRST_COMPOSED), train])
    return train, {"test": test, "validation": validation}[split]


def _lists(name, part, *, size):
    generator = np.random.default_rng(_SPLIT_SEED)
    chosen = generator.choice(part, (size, 3))
    counts = generator.integers(1, 4, size)
    languages = [
        {number: in_words(number) for number in part.tolist()}
        for in_words in (_english, _german)
    ]
    sentences = [
        tuple(
            ", ".join(words[number] for number in row[:count])
            for words in languages
        )
        for row, count in zip(chosen.tolist(), counts)
    ]
    return corpus.Pairs(f"numbers, {name}", size, lambda: sentences)


def _english(number):
    """Returns an English number without commas, which separate numbers here."""
    return num2words(number, lang="en").replace(",", "")


def _german(number):
    return num2words(number, lang="de")

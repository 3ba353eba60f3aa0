"""Sentence pairs as token ids: encoded once, cached on disk, memory-mapped.

Encoding the 4.5 million pairs of WMT takes minutes, and training reads them in
random order. So the pairs are stored as two arrays, in a directory that is
created atomically.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

import keras
import numpy as np
from absl import logging
from tokenizers import Tokenizer

from examples.transformer import vocabulary

CHUNK = 10_000
# Number of records that identify a dataset, with its name and size.
_FINGERPRINTED = 1000
_TOKENIZER = "tokenizer.json"


class Pairs(NamedTuple):
    """Sentences and their translations, as text.

    Attributes:
        name: str.
        size: int, number of pairs.
        read: callable, () to an iterable of (source, target) strings.
    """

    name: str
    size: int
    read: Callable[[], Iterable[tuple[str, str]]]


class Corpus(NamedTuple):
    """Sentences and their translations, as token ids.

    Attributes:
        tokens: uint16, shape (tokens,): source, target, source, target ... each
            ends with `vocabulary.END`.
        bounds: int64, shape (2 * pairs + 1,). Sentence i, source or target, is
            tokens[bounds[i] : bounds[i + 1]].
    """

    tokens: np.ndarray
    bounds: np.ndarray

    @property
    def lengths(self):
        """int64, shape (pairs, 2): tokens of source and target."""
        return np.diff(self.bounds).reshape(-1, 2)


def prepared(pairs, *, vocabulary_size, longest, cache_dir=None):
    """Returns the vocabulary of some pairs and the encoded pairs.

    Args:
        pairs: `Pairs`.
        vocabulary_size: int, see `vocabulary.trained`.
        longest: int, see `encode`.
        cache_dir: str, directory in which both are cached. Default: no cache.

    Returns:
        `(tokenizers.Tokenizer, Corpus)`.
    """

    def make():
        print(f"{pairs.name}: making a vocabulary", flush=True)
        tokenizer = vocabulary.trained(
            itertools.chain.from_iterable(pairs.read()), size=vocabulary_size
        )
        return tokenizer, encode(pairs, tokenizer, longest=longest)

    if cache_dir is None:
        return make()
    directory = os.path.join(
        cache_dir, _fingerprint(pairs, vocabulary_size, longest)
    )
    if not os.path.isdir(directory):
        _write(directory, *make())
    return _read(directory)


def encode(pairs, tokenizer, *, longest):
    """Returns the pairs as token ids and drops unusable pairs.

    Pairs with an empty sentence or with one longer than `longest` are dropped,
    counted and logged.

    Args:
        pairs: `Pairs`.
        tokenizer: `tokenizers.Tokenizer`.
        longest: int, maximum tokens of a sentence, including `vocabulary.END`.

    Returns:
        `Corpus`.

    Raises:
        ValueError: if there are no pairs, or at least half of them are dropped.
    """
    progress = keras.utils.Progbar(pairs.size, unit_name="pair")
    tokens, lengths, seen, empty, long = [], [np.zeros(1, np.int64)], 0, 0, 0
    reader = iter(pairs.read())
    while chunk := list(itertools.islice(reader, CHUNK)):
        seen += len(chunk)
        full = [pair for pair in chunk if all(text.strip() for text in pair)]
        empty += len(chunk) - len(full)
        ids = vocabulary.encoded(
            tokenizer, list(itertools.chain.from_iterable(full))
        )
        kept = [
            sentence
            for pair in zip(ids[::2], ids[1::2])
            if max(map(len, pair)) <= longest
            for sentence in pair
        ]
        long += len(full) - len(kept) // 2
        tokens.append(
            np.fromiter(itertools.chain.from_iterable(kept), np.uint16)
        )
        lengths.append(np.fromiter(map(len, kept), np.int64))
        progress.update(seen)
    dropped = (
        f"empty={empty}, longer_than_{longest}_tokens={long}, pairs={seen}"
    )
    if 2 * (empty + long) >= seen:
        raise ValueError(
            "`pairs` must have more usable pairs than unusable ones. "
            f"Received: name={pairs.name!r}, {dropped}"
        )
    if empty + long:
        logging.warning("%s: pairs dropped: %s", pairs.name, dropped)
    return Corpus(np.concatenate(tokens), np.cumsum(np.concatenate(lengths)))


def _fingerprint(pairs, *settings):
    """Returns a name that identifies the dataset and the settings."""
    first = list(itertools.islice(pairs.read(), _FINGERPRINTED))
    content = json.dumps([pairs.name, pairs.size, first, *settings])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write(directory, tokenizer, corpus):
    """Writes both to a directory, which is created atomically."""
    parent = os.path.dirname(directory)
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(dir=parent, prefix="partial-")
    tokenizer.save(os.path.join(partial, _TOKENIZER))
    for name, values in corpus._asdict().items():
        np.save(os.path.join(partial, f"{name}.npy"), values)
    try:
        os.rename(partial, directory)
    except OSError:
        # Another worker has written the same content.
        if not os.path.isdir(directory):
            raise
        shutil.rmtree(partial)


def _read(directory):
    arrays = [
        np.load(os.path.join(directory, f"{name}.npy"), mmap_mode="r")
        for name in Corpus._fields
    ]
    tokenizer = Tokenizer.from_file(os.path.join(directory, _TOKENIZER))
    return tokenizer, Corpus(*arrays)

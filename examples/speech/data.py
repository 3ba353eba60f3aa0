"""LibriSpeech, and digit words from a synthesizer, as log spectrograms.

LibriSpeech is read from tensorflow-datasets. Training is on train-clean-100 and
train-clean-360, 460 hours, the test on dev-clean, as in the paper.

Recordings and transcripts are padded to one length, so that all batches have
the same shape. What does not fit is left out, counted and told of.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from examples import drops, prepared, streams
from examples.speech import model, synthesizer

# Symbols 1 to 28. Symbol 0 is the blank, and the padding of transcripts.
CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"
UNKNOWN = -1

BY_HAND = "ffmpeg on the PATH, and the Python package pydub"
# The fastest reading that is not left out, in characters per second.
FASTEST = 25
# 12 seconds are 1.5 megabytes: 16,000 samples a second of 8 bytes. All records
# were shuffled when they were prepared.
SHUFFLE_BUFFER = 500

# Of the miniature. No speaker is in two parts.
SPEAKERS = {"train": 80, "validation": 32, "test": 40}
RECORDINGS_PER_SPEAKER = 12
MOST_WORDS = 2


class Format(NamedTuple):
    """What recordings and transcripts must fit in.

    Attributes:
        sample_rate: int, in Hz.
        seconds: float, length of the longest recording.
        characters: int, length of the longest transcript.
    """

    sample_rate: int
    seconds: float
    characters: int

    @property
    def bins(self):
        """Int, frequencies of a spectrogram."""
        return self.window // 2 + 1

    @property
    def window(self):
        """Int, samples in a window of 20 ms."""
        return self.sample_rate // 50

    @property
    def hop(self):
        """Int, samples from one window to the next, 10 ms."""
        return self.sample_rate // 100

    @property
    def samples(self):
        """Int, samples in the longest recording."""
        return round(self.seconds * self.sample_rate)

    def frames(self, samples):
        """Returns the number of windows in that many samples."""
        return (samples - self.window + self.hop) // self.hop


# Two of the longest words, slowly.
DIGITS = Format(synthesizer.SAMPLE_RATE, seconds=1.0, characters=11)


class Source(NamedTuple):
    """Recordings with transcripts, and how they are made ready.

    Attributes:
        splits: callable, () to what is trained and tested on: each a finite
            `tf.data.Dataset` of records, and its size.
        formats: `Format` of the training and of the test examples.
        buffer_size: int, records held for shuffling.
        examples: callable, (records, format) to examples, see `examples`.
    """

    splits: Callable
    formats: tuple[Format, Format]
    buffer_size: int
    examples: Callable

    def train_dataset(
        self, batch_size, *, seed, start=0, share=streams.Share()
    ):
        """Returns endless shuffled batches.

        Args:
            batch_size: int >= 1, examples per batch of all workers.
            seed: int, of the order.
            start: int >= 0, number of records to leave out.
            share: `streams.Share`, the part of every batch to read.

        Returns:
            `tf.data.Dataset` of batches of what `examples` returns.
        """
        (records, size), _ = self.splits()
        stream = streams.records(
            records,
            size,
            seed=seed,
            start=start,
            share=share,
            buffer_size=self.buffer_size,
        ).map(lambda record, _: record)
        return streams.batches(
            self.examples(stream, self.formats[0]), batch_size, share=share
        ).prefetch(tf.data.AUTOTUNE)

    def test_dataset(self, batch_size):
        """Returns the test examples, in order, in batches."""
        _, (records, _) = self.splits()
        return (
            self.examples(records, self.formats[1])
            .batch(batch_size)
            .prefetch(tf.data.AUTOTUNE)
        )


def librispeech(
    *, data_dir=None, validation=False, seconds=17.0, test_seconds=35.0
):
    """Returns LibriSpeech as a `Source`: 460 hours of people reading books.

    Args:
        data_dir: str, where tensorflow-datasets has it prepared; by default
            where it prepares what it is not told where to.
        validation: bool, whether to train on train-clean-360 only and to test
            on a tenth of train-clean-100: they have no speaker in common.
        seconds: float, length of the longest recording that is trained on.
        test_seconds: float, likewise that is tested on.
    """
    parts = ("train_clean100+train_clean360", "dev_clean")
    if validation:
        parts = ("train_clean360", "train_clean100[:10%]")

    @functools.cache
    def splits():
        return tuple(
            prepared.load(
                "librispeech", part, data_dir=data_dir, by_hand=BY_HAND
            )
            for part in parts
        )

    def longest(seconds):
        return Format(16_000, seconds, characters=round(FASTEST * seconds))

    return Source(
        splits,
        formats=(longest(seconds), longest(test_seconds)),
        buffer_size=SHUFFLE_BUFFER,
        examples=examples,
    )


def digits(*, validation=False):
    """Returns digit words from a synthesizer as a `Source`.

    Its records are examples: spectrograms are computed once.

    Args:
        validation: bool, whether to test on other speakers, those that
            hyper-parameters are chosen by. Without it, they are trained on.
    """
    parts = (("train", "validation"), ("test",))
    if validation:
        parts = (("train",), ("validation",))

    @functools.cache
    def splits():
        return tuple(_in_memory(recordings(*names)) for names in parts)

    return Source(
        splits,
        formats=(DIGITS, DIGITS),
        buffer_size=2000,
        examples=lambda records, _: records,
    )


def recordings(*parts):
    """Returns digit words spoken by the speakers of some parts.

    Args:
        *parts: str, keys of `SPEAKERS`.

    Returns:
        list of dicts of "speech", int16 samples, "text", and "speaker_id".
    """
    found = []
    for part in parts:
        number = list(SPEAKERS).index(part)
        for index in range(SPEAKERS[part]):
            generator = np.random.default_rng([number, index])
            speaker = synthesizer.speaker(generator)
            for _ in range(RECORDINGS_PER_SPEAKER):
                words = generator.choice(
                    list(synthesizer.WORDS),
                    generator.integers(1, MOST_WORDS, endpoint=True),
                )
                speech = synthesizer.speak(
                    words, speaker=speaker, generator=generator
                )
                found.append(
                    {
                        "speech": speech,
                        "text": " ".join(words),
                        "speaker_id": f"{part}-{index}",
                    }
                )
    return found


def _in_memory(records):
    """Returns recordings as a `tf.data.Dataset` of examples, and its size."""
    dataset = tf.data.Dataset.from_generator(
        lambda: records,
        output_signature={
            "speech": tf.TensorSpec([None], tf.int16),
            "text": tf.TensorSpec([], tf.string),
            "speaker_id": tf.TensorSpec([], tf.string),
        },
    )
    batch = examples(dataset, DIGITS).batch(len(records))
    inputs, labels = next(batch.as_numpy_iterator())
    return tf.data.Dataset.from_tensor_slices((inputs, labels)), len(labels)


def encode(text):
    """Returns the symbols of a text.

    Args:
        text: string tensor, of any case.

    Returns:
        int32 tensor of one symbol per byte, `UNKNOWN` for what has none.

    Example:

    >>> encode("I'm A B").numpy().tolist()
    [11, 2, 15, 1, 3, 1, 4]
    """
    table = np.full(256, UNKNOWN, "int32")
    for symbol, character in enumerate(CHARACTERS, start=1):
        table[ord(character)] = symbol
    text = tf.strings.lower(tf.strings.strip(text))
    return tf.gather(table, tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32))


def decode(symbols):
    """Returns the text of symbols; nothing stands for 0 and less.

    Example:

    >>> decode([11, 2, 15, 1, 3, 1, 4, 0, 0])
    "i'm a b"
    """
    return "".join(CHARACTERS[symbol - 1] for symbol in symbols if symbol > 0)


def spectrogram(speech, form):
    """Returns the logarithm of a recording's spectrum over time.

    Args:
        speech: int16 samples in a tensor of any integers, shape (samples,).
        form: `Format`.

    Returns:
        float32 tensor of shape (form.frames(samples), form.bins), of mean 0 and
        standard deviation 1.
    """
    spectrum = tf.signal.stft(
        tf.cast(speech, tf.float32) / 2**15,
        frame_length=form.window,
        frame_step=form.hop,
        fft_length=form.window,
    )
    # What is added is less than the rounding to 16 bits makes: no log of 0.
    features = tf.math.log(tf.abs(spectrum) + 1e-5)
    mean, variance = tf.nn.moments(features, [0, 1])
    return (features - mean) / (tf.sqrt(variance) + 1e-5)


def frames_needed(labels):
    """Returns the least number of frames that a transcript takes under CTC.

    One per character, and a blank between two that are the same.

    Example:

    >>> int(frames_needed(encode("three")))
    6
    """
    repeats = tf.math.count_nonzero(labels[1:] == labels[:-1], dtype=tf.int32)
    return tf.size(labels) + repeats


def examples(records, form):
    """Returns the examples that records make, without those that do not fit.

    Args:
        records: `tf.data.Dataset` of dicts of "speech", int64 samples, and
            "text".
        form: `Format`.

    Returns:
        `tf.data.Dataset` of (inputs, labels): a dict of "features" and
        "lengths", see `model.deep_speech`; and the symbols of the transcript,
        padded with 0.
    """

    def fits(speech, labels):
        frames = form.frames(tf.size(speech))
        return model.output_lengths(frames) >= frames_needed(labels)

    def example(speech, labels):
        features = spectrogram(speech, form)
        length = tf.shape(features)[0]
        rest = form.frames(form.samples) - length
        features = tf.pad(features, [(0, rest), (0, 0)])
        labels = tf.pad(labels, [(0, form.characters - tf.size(labels))])
        return (
            {
                "features": tf.ensure_shape(features, [None, form.bins]),
                "lengths": length,
            },
            tf.ensure_shape(labels, [form.characters]),
        )

    dataset = records.map(
        lambda record: (record["speech"], encode(record["text"]))
    )
    for predicate, reason in [
        (
            lambda speech, _: tf.size(speech) <= form.samples,
            f"recording of more than {form.seconds} seconds",
        ),
        (lambda _, labels: tf.size(labels) > 0, "empty transcript"),
        (
            lambda _, labels: tf.size(labels) <= form.characters,
            f"transcript of more than {form.characters} characters",
        ),
        (
            lambda _, labels: tf.reduce_all(labels != UNKNOWN),
            "transcript with other characters than letters, ' and space",
        ),
        (fits, "recording too short for its transcript"),
    ]:
        dataset = drops.filtered(dataset, predicate, reason)
    return dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)

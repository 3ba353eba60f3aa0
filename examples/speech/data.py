"""LibriSpeech, or synthesized digit words in its place, as log spectrograms.

The full size trains on train-clean-100 and train-clean-360, 460 hours, and
tests on dev-clean, as in the paper.

Recordings and transcripts are padded to one length, so that all batches have
the same shape. Examples that are too long are dropped, counted and logged.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from examples.common.data import drops, prepared, streams
from examples.speech import model, synthesizer

# Symbols 1 to 28. Symbol 0 is the blank and also pads transcripts.
CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"
UNKNOWN = -1

BY_HAND = "ffmpeg on the PATH, and the Python package pydub"
# Recordings with more characters per second are dropped.
FASTEST = 25
# A record of 12 seconds takes 1.5 MB: 16,000 samples per second of 8 bytes. The
# buffer can be small because preparing has shuffled the records.
SHUFFLE_BUFFER = 500

# Numbers of speakers of the miniature. No speaker is in two parts.
SPEAKERS = {"train": 80, "validation": 32, "test": 40}
RECORDINGS_PER_SPEAKER = 12
MOST_WORDS = 2


class Format(NamedTuple):
    """The format of recordings and the maximum lengths.

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
        """Int, number of frequencies of a spectrogram."""
        return self.window // 2 + 1

    @property
    def window(self):
        """Int, samples in a window of 20 ms."""
        return self.sample_rate // 50

    @property
    def hop(self):
        """Int, samples between the starts of two windows, 10 ms."""
        return self.sample_rate // 100

    @property
    def samples(self):
        """Int, samples in the longest recording."""
        return round(self.seconds * self.sample_rate)

    def frames(self, samples):
        """Returns the number of windows in a number of samples."""
        return (samples - self.window + self.hop) // self.hop


# Long enough for two of the longest words, spoken slowly.
DIGITS = Format(synthesizer.SAMPLE_RATE, seconds=1.0, characters=11)


class Source(NamedTuple):
    """Recordings with transcripts, and their preprocessing.

    Attributes:
        splits: callable, () to the training and the test records. Each is a
            finite `tf.data.Dataset` and its size.
        formats: `Format` of the training and of the test examples.
        buffer_size: int, size of the shuffle buffer.
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
            start: int >= 0, number of records to skip.
            share: `streams.Share`, the part of each batch to read.

        Returns:
            `tf.data.Dataset` of batches, see `examples`.
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
        data_dir: str, see `prepared.load`.
        validation: bool, whether to train on train-clean-360 only and test on
            a tenth of train-clean-100. The two have no speaker in common.
        seconds: float, length of the longest training recording.
        test_seconds: float, length of the longest test recording.
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
    """Returns synthesized digit words as a `Source`.

    Its records are examples already: spectrograms are computed once.

    Args:
        validation: bool, whether to hold out and test on the speakers for
            validation. By default, they are trained on.
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
        list of dicts with "speech" (int16 samples), "text" and "speaker_id".
    """
    return [record for part in parts for record in _recordings(part)]


@functools.cache
def _recordings(part):
    number = list(SPEAKERS).index(part)
    found = []
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
    """Returns a `tf.data.Dataset` of the recordings' examples, and its size."""
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
        text: string tensor, upper or lower case.

    Returns:
        int32 tensor of one symbol per byte, `UNKNOWN` for other characters.

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
    """Returns the text of symbols, without those that are 0 or negative.

    Example:

    >>> decode([11, 2, 15, 1, 3, 1, 4, 0, 0])
    "i'm a b"
    """
    return "".join(CHARACTERS[symbol - 1] for symbol in symbols if symbol > 0)


def spectrogram(speech, form):
    """Returns the log spectrogram of a recording.

    Args:
        speech: integers in the range of int16, shape (samples,).
        form: `Format`.

    Returns:
        float32 tensor of shape (form.frames(samples), form.bins) with mean 0
        and standard deviation 1.
    """
    spectrum = tf.signal.stft(
        tf.cast(speech, tf.float32) / 2**15,
        frame_length=form.window,
        frame_step=form.hop,
        fft_length=form.window,
    )
    # The constant avoids log(0). It is smaller than the error of 16 bits.
    features = tf.math.log(tf.abs(spectrum) + 1e-5)
    mean, variance = tf.nn.moments(features, [0, 1])
    return (features - mean) / (tf.sqrt(variance) + 1e-5)


def frames_needed(labels):
    """Returns the number of frames that CTC needs for a transcript.

    CTC needs one per character, and a blank between two equal characters.

    Example:

    >>> int(frames_needed(encode("three")))
    6
    """
    repeats = tf.math.count_nonzero(labels[1:] == labels[:-1], dtype=tf.int32)
    return tf.size(labels) + repeats


def examples(records, form):
    """Returns the examples of records and drops those that do not fit.

    Args:
        records: `tf.data.Dataset` of dicts with "speech" (integer samples) and
            "text".
        form: `Format`.

    Returns:
        `tf.data.Dataset` of (inputs, labels). The inputs are a dict with
        "features" and "lengths", see `model.deep_speech`. The labels are the
        symbols of the transcript, padded with 0.
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

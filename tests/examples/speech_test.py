"""The speech trainer: Deep Speech 2, and the miniature on digit words."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.common import training
from examples.common.data import streams
from examples.speech import data, model, synthesizer, train
from tests.examples import full_size, prepared_fixture

# The average speaker in a silent room.
AVERAGE = synthesizer.Speaker(
    pitch=100, tract=1.0, tempo=1.0, brightness=0.7, noise=0.0
)
TINY = model.Size(
    filters=2,
    kernels=((3, 5), (3, 5)),
    recurrent_layers=1,
    units=4,
    momentum=0.9,
)
BINS = 9
SYMBOLS = 5
SHORT = data.Format(16_000, seconds=1.0, characters=8)


def generator():
    return np.random.default_rng(0)


def recording(number, text, *, samples=12_000):
    """Returns a record of LibriSpeech. The number is the seed."""
    speech = np.random.default_rng(number).integers(-999, 999, samples)
    return number, {
        "speech": speech,
        "text": text,
        "speaker_id": number,
        "chapter_id": 0,
        "id": str(number),
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """LibriSpeech with recordings of 0.75 seconds of noise."""
    path = tmp_path_factory.mktemp("prepared")
    words = [chr(ord("A") + number) * 2 for number in range(26)]
    prepared_fixture.prepare(
        "librispeech",
        path,
        {
            "train_clean100": [recording(n, words[n]) for n in range(10)],
            "train_clean360": [recording(n, words[n]) for n in range(10, 20)],
            "dev_clean": [recording(n, words[n]) for n in range(20, 23)],
        },
    )
    return str(path)


@pytest.fixture(scope="module")
def digits():
    """The data of the miniature."""
    return data.digits()


@pytest.fixture(scope="module")
def full():
    with full_size.not_initialized():
        return model.deep_speech(model.FULL, bins=161, symbols=29)


def texts(dataset):
    return [
        data.decode(symbols)
        for _, labels in dataset.as_numpy_iterator()
        for symbols in labels
    ]


def letters(numbers):
    return sorted(chr(ord("a") + number) * 2 for number in numbers)


def inputs(batch=3, frames=11, *, seed=0):
    """Returns random utterances. The padding is 1000."""
    random = np.random.default_rng(seed)
    lengths = np.array([frames, 5, 8][:batch], "int32")
    features = random.standard_normal((batch, frames, BINS)).astype("float32")
    features[np.arange(frames) >= lengths[:, None]] = 1000
    return {"features": features, "lengths": lengths}


def padded(utterances, *, frames):
    more = [(0, 0), (0, frames), (0, 0)]
    features = np.pad(utterances["features"], more, constant_values=-1000)
    return {**utterances, "features": features}


class TestSynthesizer:
    @pytest.fixture
    def vowel(self, monkeypatch):
        """Function of phone and speaker: power spectrum, and bins per Hz."""

        def power(symbol, speaker):
            monkeypatch.setitem(synthesizer.WORDS, "vowel", 8 * symbol)
            speech = synthesizer.speak(
                ["vowel"], speaker=speaker, generator=generator()
            )
            middle = speech[len(speech) // 4 : -len(speech) // 4]
            power = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))) ** 2
            return power, len(middle) / synthesizer.SAMPLE_RATE

        return power

    @pytest.mark.parametrize("symbol", ["i", "a", "u"])
    @pytest.mark.parametrize("tract", [0.9, 1.1])
    def test_formants(self, vowel, symbol, tract):
        power, hz = vowel(symbol, AVERAGE._replace(tract=tract))
        first, *_ = synthesizer.PHONES[symbol].formants
        strongest = power[: int(1100 * hz)].argmax() / hz
        # A harmonic of the pitch.
        assert strongest == pytest.approx(tract * first, abs=100)

    @pytest.mark.parametrize("pitch", [100, 180])
    def test_pitch(self, vowel, pitch):
        power, _ = vowel("a", AVERAGE._replace(pitch=pitch))
        periods = np.fft.irfft(power)
        lags = np.arange(int(8000 / 250), int(8000 / 70))
        lag = lags[np.argmax(periods[lags])]
        # A recording is up to 10 % higher or lower, and falls by 20 %.
        assert synthesizer.SAMPLE_RATE / lag == pytest.approx(pitch, rel=0.25)

    def test_fricatives_are_noise_of_their_band(self, vowel):
        power, hz = vowel("s", AVERAGE)
        centre, _ = synthesizer.PHONES["s"].noise_band
        split = int(0.8 * centre * hz)
        assert power[split:].sum() > 4 * power[:split].sum()

    def test_plosives_begin_with_silence(self):
        speech = synthesizer.speak(
            ["two"], speaker=AVERAGE, generator=generator()
        )
        # Silence of at least 0.8 * (50 + 30) ms, constant and then fading in.
        assert not speech[: int(0.05 * synthesizer.SAMPLE_RATE)].any()
        assert speech.any()

    def test_tempo(self):
        slow, fast = (
            synthesizer.speak(
                ["seven", "nine"],
                speaker=AVERAGE._replace(tempo=tempo),
                generator=generator(),
            )
            for tempo in (1.2, 0.8)
        )
        assert len(slow) / len(fast) == pytest.approx(1.5, rel=1e-3)

    def test_every_recording_differs(self):
        random = generator()
        lengths = {
            len(synthesizer.speak(["six"], speaker=AVERAGE, generator=random))
            for _ in range(3)
        }
        assert len(lengths) == 3

    def test_words_are_made_of_phones(self):
        assert len(synthesizer.WORDS) == 10
        for symbols in synthesizer.WORDS.values():
            assert set(symbols) <= set(synthesizer.PHONES)


class TestSpectrogram:
    def test_full_size(self):
        # 20 ms at 16 kHz are 320 samples: 161 frequencies, 50 Hz apart.
        source = data.librispeech()
        train_format, test_format = source.formats
        assert (train_format.window, train_format.hop) == (320, 160)
        assert train_format.bins == 161
        # 1 + (17 * 16000 - 320) / 160
        assert train_format.frames(train_format.samples) == 1699
        assert test_format.frames(test_format.samples) == 3499

    def test_is_that_of_a_tone(self):
        time = np.arange(4000) / 16_000
        tone = np.round(9000 * np.sin(2 * np.pi * 1000 * time)).astype("int64")
        features = data.spectrogram(tone, SHORT).numpy()
        # 1 + (4000 - 320) // 160
        assert features.shape == (24, 161)
        # 1000 Hz / 50 Hz
        assert set(features.argmax(axis=1)) == {20}
        assert features.mean() == pytest.approx(0, abs=1e-4)
        assert features.std() == pytest.approx(1, abs=1e-4)

    def test_does_not_depend_on_loudness(self):
        speech = recording(0, "")[1]["speech"]
        np.testing.assert_allclose(
            data.spectrogram(speech, SHORT),
            data.spectrogram(30 * speech, SHORT),
            atol=0.01,
        )

    def test_silence_is_finite(self):
        features = data.spectrogram(np.zeros(4000, "int64"), SHORT)
        # All are equal, except for the rounding of their mean.
        assert np.all(np.abs(features) < 1)


class TestTranscripts:
    def test_round_trip(self):
        text = "the quick brown fox jumps over the lazy dog's back"
        symbols = data.encode(text.upper()).numpy()
        assert data.decode(symbols) == text
        assert set(symbols) == set(range(1, 29))

    def test_unknown_characters(self):
        # Two bytes of UTF-8.
        assert data.encode("a1é").numpy().tolist() == [3] + 3 * [data.UNKNOWN]

    @pytest.mark.parametrize(
        "text, frames",
        [("a", 1), ("ab", 2), ("aa", 3), ("aaa", 5), ("aba", 3), ("a a", 3)],
    )
    def test_frames_needed(self, text, frames):
        assert int(data.frames_needed(data.encode(text))) == frames


class TestExamples:
    def examples(self, *records, form=SHORT):
        keys = "speech", "text"
        dataset = tf.data.Dataset.from_generator(
            lambda: ({key: r[key] for key in keys} for _, r in records),
            output_signature={
                "speech": tf.TensorSpec([None], tf.int64),
                "text": tf.TensorSpec([], tf.string),
            },
        )
        return data.examples(dataset, form)

    def test_are_padded(self):
        record = recording(0, "HELLO", samples=4000)
        ((found, labels),) = self.examples(record)
        # 1 + (16000 - 320) / 160 frames in a second.
        assert found["features"].shape == (99, 161)
        assert found["lengths"] == 24
        np.testing.assert_allclose(
            found["features"][:24],
            data.spectrogram(record[1]["speech"], SHORT),
            rtol=1e-4,
            atol=1e-5,
        )
        assert not found["features"][24:].numpy().any()
        assert labels.numpy().tolist() == [10, 7, 14, 14, 17, 0, 0, 0]

    @pytest.mark.parametrize(
        "bad, reason",
        [
            (recording(1, "A", samples=16_001), "more than 1.0 seconds"),
            (recording(1, " "), "empty transcript"),
            (recording(1, "ABCDEFGHI"), "more than 8 characters"),
            (recording(1, "A-B"), "other characters"),
            # 5 frames, 3 outputs; "AAB" takes 4.
            (recording(1, "AAB", samples=960), "too short"),
            (recording(1, "A", samples=100), "too short"),
        ],
    )
    def test_other_records_are_dropped_and_logged(self, bad, reason, caplog):
        records = recording(0, "GOOD"), bad, recording(2, "ALSO")
        found = texts(self.examples(*records).batch(1))
        assert found == ["good", "also"]
        assert "1 of 3 records dropped" in caplog.text
        assert reason in caplog.text

    def test_records_that_just_fit_are_kept(self, caplog):
        records = [
            recording(1, "ABCDEFGH", samples=16_000),
            # 1 + (960 - 320) / 160 = 5 frames, 3 outputs.
            recording(2, "AA", samples=960),
        ]
        assert texts(self.examples(*records).batch(1)) == ["abcdefgh", "aa"]
        assert not caplog.text


class TestDigits:
    def test_nothing_is_dropped(self, digits, caplog):
        (_, train_size), (_, test_size) = digits.splits()
        assert (train_size, test_size) == (12 * (80 + 32), 12 * 40)
        assert not caplog.text

    @pytest.mark.parametrize("validation", [False, True])
    def test_validation_holds_out_speakers(self, validation, monkeypatch):
        monkeypatch.setattr(data, "recordings", lambda *parts: parts)
        monkeypatch.setattr(data, "_in_memory", lambda recordings: recordings)
        assert data.digits(validation=validation).splits() == (
            (("train",), ("validation",))
            if validation
            else (("train", "validation"), ("test",))
        )

    def test_no_speaker_is_in_two_parts(self):
        known = set()
        for part in data.SPEAKERS:
            found = data.recordings(part)
            speakers = {record["speaker_id"] for record in found}
            takes = {record["speech"].tobytes() for record in found}
            assert len(speakers) == data.SPEAKERS[part]
            assert len(takes) == len(found)
            assert not known & (speakers | takes)
            known |= speakers | takes

    def test_is_the_same_every_time(self, monkeypatch):
        monkeypatch.setattr(data, "SPEAKERS", {**data.SPEAKERS, "test": 2})
        first, second = (data._recordings.__wrapped__("test") for _ in range(2))
        assert len(first) == len(second) == 2 * data.RECORDINGS_PER_SPEAKER
        for one, other in zip(first, second):
            assert one["text"] == other["text"]
            np.testing.assert_array_equal(one["speech"], other["speech"])

    def test_all_words_are_spoken(self):
        spoken = {
            word
            for record in data.recordings("test")
            for word in record["text"].split()
        }
        assert spoken == set(synthesizer.WORDS)

    def test_resumes_and_is_shared(self, digits):
        source = digits
        whole = texts(source.train_dataset(8, seed=1).take(4))
        rest = texts(source.train_dataset(8, seed=1, start=16).take(2))
        assert rest == whole[16:]
        halves = [
            texts(
                source.train_dataset(
                    8, seed=1, share=streams.Share(index, 2)
                ).take(4)
            )
            for index in range(2)
        ]
        assert (halves[0], halves[1]) == (whole[::2], whole[1::2])


class TestLibrispeech:
    def source(self, data_dir, **kwargs):
        return data.librispeech(
            data_dir=data_dir, seconds=1.0, test_seconds=1.0, **kwargs
        )

    def test_trains_on_460_hours(self, data_dir):
        source = self.source(data_dir)
        ((found, labels),) = source.train_dataset(20, seed=0).take(1)
        assert found["features"].shape == (20, 99, 161)
        # 1 + (12000 - 320) / 160
        assert found["lengths"].numpy().tolist() == 20 * [74]
        assert labels.shape == (20, 25)
        assert sorted(map(data.decode, labels.numpy())) == letters(range(20))

    def test_tests_on_dev_clean(self, data_dir):
        found = texts(self.source(data_dir).test_dataset(2))
        assert sorted(found) == letters(range(20, 23))

    def test_validation_is_on_other_speakers(self, data_dir):
        source = self.source(data_dir, validation=True)
        trained = texts(source.train_dataset(10, seed=0).take(1))
        assert sorted(trained) == letters(range(10, 20))
        (tested,) = texts(source.test_dataset(10))
        assert tested in letters(range(10))

    def test_unprepared_says_how_to_prepare(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"\.data\.prepared librispeech --data_dir="
        ) as error:
            self.source(str(tmp_path)).train_dataset(2, seed=0)
        assert "ffmpeg" in str(error.value)


class TestDeepSpeech:
    def test_full_size(self, full):
        # With biases. The convolutions reduce 161 bins to 81 and to 41.
        convolutions = (11 * 41 + 1) * 32 + (11 * 21 * 32 + 1) * 32
        # A GRU's three gates see the input, the state, and two biases each;
        # there are two directions.
        recurrent = 2 * 3 * 800 * (41 * 32 + 800 + 2)
        recurrent += 4 * 2 * 3 * 800 * (800 + 800 + 2)
        dense = (800 + 1) * 29
        # The normalized channels: of the spectrogram, of the first convolution,
        # and of the inputs of the GRUs and the dense layer.
        channels = 1 + 32 + 41 * 32 + 4 * 800 + 800
        trainable = sum(v.shape.num_elements() for v in full.trainable_weights)
        assert trainable == convolutions + recurrent + dense + 2 * channels
        assert trainable == 41_190_559
        # Moving mean and variance.
        assert full.count_params() - trainable == 2 * channels

    def test_miniature(self):
        built = model.deep_speech(model.MINIATURE, bins=81, symbols=29)
        # The convolutions reduce 81 bins to 41 and to 21.
        trainable = (5 * 11 + 1) * 12 + (5 * 11 * 12 + 1) * 12
        trainable += 2 * 3 * 64 * (21 * 12 + 64 + 2) + 2 * 3 * 64 * (
            64 + 64 + 2
        )
        trainable += (64 + 1) * 29 + 2 * (1 + 12 + 21 * 12 + 64 + 64)
        found = sum(v.shape.num_elements() for v in built.trainable_weights)
        assert found == trainable == 183_307

    def test_kernels_and_normalization(self, full):
        first, second = (
            layer
            for layer in full.layers
            if isinstance(layer, keras.layers.Conv2D)
        )
        # Time by frequency.
        assert (first.kernel_size, first.strides) == ((11, 41), (2, 2))
        assert (second.kernel_size, second.strides) == ((11, 21), (1, 2))
        normalizations = [
            layer
            for layer in full.layers
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        assert len(normalizations) == 2 + 5 + 1
        for layer in normalizations:
            assert (layer.momentum, layer.epsilon) == (0.997, 1e-5)

    @pytest.mark.parametrize("frames", [1, 2, 9, 10])
    def test_output_lengths(self, frames):
        built = model.deep_speech(TINY, bins=BINS, symbols=SYMBOLS)
        utterances = {
            "features": np.zeros((1, frames, BINS)),
            "lengths": np.array([frames]),
        }
        _, outputs, _ = built(utterances).shape
        assert outputs == model.output_lengths(frames)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("more", [1, 6])
    def test_padding_changes_nothing(self, training, more):
        built = model.deep_speech(TINY, bins=BINS, symbols=SYMBOLS)
        logits = built(inputs(), training=training).numpy()
        longer = built(padded(inputs(), frames=more), training=training)
        np.testing.assert_allclose(
            longer[:, : logits.shape[1]], logits, rtol=1e-5, atol=1e-6
        )

    def test_padding_does_not_change_the_averages(self):
        averages = []
        for utterances in (inputs(), padded(inputs(), frames=6)):
            keras.utils.set_random_seed(0)
            built = model.deep_speech(TINY, bins=BINS, symbols=SYMBOLS)
            built(utterances, training=True)
            averages.append([v.numpy() for v in built.non_trainable_weights])
        for found, expected in zip(*averages, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_padding_is_blank(self):
        logits = model.deep_speech(TINY, bins=BINS, symbols=SYMBOLS)(inputs())
        probabilities = tf.nn.softmax(logits).numpy()
        # 11, 5 and 8 frames make 6, 3 and 4.
        for row, length in zip(probabilities, (6, 3, 4)):
            assert np.all(row[:length, 0] < 0.9)
            np.testing.assert_allclose(row[length:, 0], 1, rtol=1e-6)

    def test_loss_and_gradient_are_those_of_the_utterances(self):
        built = model.deep_speech(TINY, bins=BINS, symbols=SYMBOLS)
        labels = np.array([[1, 1, 2, 3], [4, 1, 0, 0], [2, 2, 0, 0]], "int32")
        with tf.GradientTape(persistent=True) as tape:
            logits = built(inputs(), training=True)
            found = keras.losses.ctc(labels, logits)
            # Another implementation, which takes the lengths.
            expected = tf.nn.ctc_loss(
                tf.sparse.from_dense(labels),
                tf.cast(logits, tf.float32),
                label_length=None,
                logit_length=[6, 3, 4],
                logits_time_major=False,
                blank_index=0,
            )
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        weights = built.trainable_variables
        for gradient, other in zip(
            tape.gradient(found, weights), tape.gradient(expected, weights)
        ):
            np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-5)


class TestEvaluate:
    class Oracle:
        """Predicts given transcripts, with a symbol per two frames."""

        def __init__(self, *transcripts):
            symbols = np.zeros((len(transcripts), 24), "int32")
            for row, text in zip(symbols, transcripts):
                row[0 : 2 * len(text) : 2] = data.encode(text)
            # The other symbols have the probability 28 exp(-20) = 6e-8.
            self.logits = 20 * np.eye(29, dtype="float32")[symbols]

        def __call__(self, numbers, training):
            return tf.gather(self.logits, numbers)

    def evaluate(self, *transcripts):
        texts = "three two", "six", "seven"
        labels = np.zeros((3, 11), "int32")
        for row, text in zip(labels, texts):
            row[: len(text)] = data.encode(text)
        dataset = tf.data.Dataset.from_tensor_slices((np.arange(3), labels))
        return train.evaluate(self.Oracle(*transcripts), dataset.batch(2))

    def test_all_is_right(self):
        metrics = self.evaluate("three two", "six", "seven")
        assert metrics["word_accuracy"] == 1.0
        assert metrics["loss"] == pytest.approx(0, abs=1e-4)

    def test_errors_are_counted_in_words(self):
        # A wrong word and an additional one: 2 errors in 4 words.
        metrics = self.evaluate("three too", "six", "seven one")
        assert metrics["word_accuracy"] == 0.5
        assert metrics["loss"] > 1

    def test_is_not_negative(self):
        assert train.word_accuracy(["six"], ["see it"]) == 0.0
        assert train.word_accuracy(["six"], [""]) == 0.0

    def test_greedy_decoding_merges_repeats(self):
        # aa, blank, a, padding: "aa".
        symbols = np.array([[3, 3, 0, 3, 0, 0]])
        assert train.transcripts(np.eye(29, dtype="float32")[symbols]) == ["aa"]


class TestTask:
    @pytest.mark.parametrize(
        "name, batch, steps, rate",
        [("tfds", 32, 84_800, 1.4e-3), ("embedded", 8, 1200, 6e-3)],
    )
    def test_is_the_papers(self, name, batch, steps, rate):
        task = train.task(data=name)
        assert task.name.startswith("speech")
        assert (task.base_batch, task.total_steps) == (batch, steps)
        for total_steps in (steps, 100):
            schedule = task.schedule(total_steps)
            np.testing.assert_allclose(
                [schedule(0), schedule(total_steps)],
                [rate, 0.05 * rate],
                rtol=1e-5,
            )
        optimizer = task.optimizer(schedule)
        assert isinstance(optimizer, keras.optimizers.SGD)
        assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
        assert optimizer.global_clipnorm == 100

    def test_learning_rate(self):
        task = train.task(learning_rate=0.5)
        assert float(task.schedule(10)(0)) == 0.5

    def test_full_size_fits_its_data(self, data_dir, monkeypatch):
        fast = model.FULL._replace(filters=2, recurrent_layers=1, units=4)
        monkeypatch.setattr(model, "FULL", fast)
        # 0.8 instead of 17 seconds.
        task = train.task(
            data="tfds", data_dir=data_dir, seconds=0.8, test_seconds=0.8
        )
        full_size.model_that_fits(task, 2)

    def test_miniature_learns_with_xla(self, tmp_path, monkeypatch):
        small = model.MINIATURE._replace(
            filters=4, recurrent_layers=1, units=16
        )
        monkeypatch.setattr(model, "MINIATURE", small)
        training.run(
            train.task(split="validation"),
            training.Settings(
                algorithm="adascale",
                scale=2,
                total_steps=20,
                jit_compile=True,
                model_dir=str(tmp_path),
                smoke=True,
            ),
        )
        log = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
        assert log["loss"][-1] < 0.5 * log["loss"][0]

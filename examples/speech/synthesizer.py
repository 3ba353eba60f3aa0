"""Digit words spoken by synthetic speakers: a formant synthesizer in NumPy.

A voice is a train of glottal pulses. Each pulse makes the vocal tract ring: a
sum of damped sinusoids, one per resonance (formant). Vowels, nasals and glides
differ in the frequencies of the formants. Fricatives are noise through another
resonance. Plosives are silence and a burst of such noise. Phones last 20 to 90
milliseconds, and formants glide from one phone to the next.

References: Klatt, "Software for a cascade/parallel formant synthesizer", 1980.
The formants of the vowels are rounded from Peterson and Barney, "Control
methods used in a study of the vowels", 1952.
"""

from typing import NamedTuple

import numpy as np

SAMPLE_RATE = 8000  # In Hz.
# Durations for which a pulse rings, and noise.
PULSE_SECONDS = 0.016
NOISE_SECONDS = 0.004
FOURTH_FORMANT = 3500
BANDWIDTHS = np.array([70, 90, 130, 200])


class Phone(NamedTuple):
    """A sound of speech, as the average speaker produces it.

    Attributes:
        seconds: float, duration.
        formants: three frequencies in Hz.
        voice: float, amplitude of the glottal pulses.
        noise: float, amplitude of the noise.
        noise_band: (centre, width) of the noise in Hz.
    """

    seconds: float
    formants: tuple[int, int, int] = (500, 1500, 2500)
    voice: float = 0.0
    noise: float = 0.0
    noise_band: tuple[int, int] = (2000, 2000)


PHONES = {
    # Vowels, and halves of diphthongs.
    "i": Phone(0.09, (270, 2290, 3010), voice=1.0),
    "I": Phone(0.06, (390, 1990, 2550), voice=1.0),
    "e": Phone(0.06, (480, 2000, 2600), voice=1.0),
    "E": Phone(0.07, (530, 1840, 2480), voice=1.0),
    "a": Phone(0.07, (730, 1090, 2440), voice=1.0),
    "V": Phone(0.08, (640, 1190, 2390), voice=1.0),
    "O": Phone(0.08, (570, 840, 2410), voice=1.0),
    "o": Phone(0.06, (500, 900, 2400), voice=1.0),
    "U": Phone(0.05, (340, 900, 2240), voice=0.8),
    "u": Phone(0.09, (300, 870, 2240), voice=1.0),
    "@": Phone(0.05, (500, 1500, 2500), voice=0.8),
    # Glides and nasals.
    "r": Phone(0.05, (420, 1300, 1600), voice=0.7),
    "w": Phone(0.05, (300, 610, 2200), voice=0.6),
    "n": Phone(0.06, (250, 1300, 2300), voice=0.5),
    # Fricatives.
    "f": Phone(0.06, noise=0.2, noise_band=(1500, 3000)),
    "T": Phone(0.06, noise=0.15, noise_band=(2500, 1500)),
    "v": Phone(0.04, (280, 1100, 2200), 0.4, 0.1, (1500, 3000)),
    "s": Phone(0.08, noise=0.5, noise_band=(3600, 400)),
    "z": Phone(0.06, (280, 1700, 2500), 0.3, 0.3, (3600, 400)),
    # Plosives: closed, then a burst.
    ".": Phone(0.03),
    "t": Phone(0.02, noise=0.6, noise_band=(3000, 800)),
    "k": Phone(0.02, noise=0.6, noise_band=(1900, 500)),
}

WORDS = {
    "zero": "zIroU",
    "one": "wVn",
    "two": ".tu",
    "three": "Tri",
    "four": "fOr",
    "five": "faIv",
    "six": "sI.ks",
    "seven": "sEv@n",
    "eight": "eI.t",
    "nine": "naIn",
}


SILENCE = Phone(0.05)


class Speaker(NamedTuple):
    """The properties of one speaker's voice.

    Attributes:
        pitch: float, in Hz.
        tract: float, factor of the formants: 1 / length of the vocal tract.
        tempo: float, factor of the durations.
        brightness: float, amplitude of a formant / that of the formant below.
        noise: float, amplitude of the room's noise.
    """

    pitch: float
    tract: float
    tempo: float
    brightness: float
    noise: float


class Score(NamedTuple):
    """The phones to speak, with their times.

    Attributes:
        phones: list of `Phone`.
        ends: float64, shape (len(phones),), the end of each phone in seconds.
    """

    phones: list[Phone]
    ends: np.ndarray

    def at(self, times, values):
        """Interpolates values of the phones at some times.

        A value is constant over the middle half of its phone, and linear
        between phones.
        """
        seconds = np.diff(self.ends, prepend=0)
        knots = self.ends - np.outer([0.75, 0.25], seconds)
        return np.interp(times, knots.ravel(order="F"), np.repeat(values, 2))


def speaker(generator):
    """Returns a `Speaker` drawn from a NumPy generator."""
    return Speaker(
        pitch=90 * 2.5 ** generator.random(),
        tract=generator.uniform(0.87, 1.15),
        tempo=generator.uniform(0.8, 1.2),
        brightness=generator.uniform(0.5, 0.9),
        noise=10 ** generator.uniform(-2.5, -1.5),
    )


def speak(words, *, speaker, generator):
    """Returns a recording of words: int16 samples at `SAMPLE_RATE`.

    Every recording is different, even of the same words and speaker.

    Args:
        words: list of keys of `WORDS`.
        speaker: `Speaker`.
        generator: `np.random.Generator` of the differences.

    Example:

    >>> generator = np.random.default_rng(0)
    >>> recording = speak(
    ...     ["six", "two"], speaker=speaker(generator), generator=generator)
    >>> recording.dtype, 0.4 < len(recording) / SAMPLE_RATE < 1.0
    (dtype('int16'), True)
    """
    phones = [SILENCE]
    for word in words:
        phones += [*(PHONES[symbol] for symbol in WORDS[word]), SILENCE]
    seconds = np.array([phone.seconds for phone in phones]) * speaker.tempo
    seconds *= generator.uniform(0.8, 1.25, len(phones))
    score = Score(phones, np.cumsum(seconds))
    samples = _voice(score, speaker=speaker, generator=generator)
    samples += _noise(score, generator=generator)
    samples *= generator.uniform(0.3, 0.9) / np.abs(samples).max()
    samples += speaker.noise * generator.standard_normal(len(samples))
    return np.round(32767 * np.clip(samples, -1, 1)).astype("int16")


def _indices(seconds):
    """Returns the indices of the samples at some times."""
    return (np.asarray(seconds) * SAMPLE_RATE).astype(int)


def _voice(score, *, speaker, generator):
    """Returns the glottal pulses, filtered by the formants of their times."""
    phones, ends = score
    # The pitch falls from pulse to pulse, and each period varies a little.
    # There are more pulses than fit: the rest is cut off.
    count = int(2 * speaker.pitch * ends[-1])
    fall = np.linspace(1.1, 0.7, count) * generator.uniform(0.9, 1.1)
    jitter = generator.uniform(0.97, 1.03, count)
    starts = np.cumsum(1 / (speaker.pitch * fall * jitter))
    starts = starts[starts < ends[-1] - PULSE_SECONDS]

    spread = generator.uniform(0.95, 1.05, (len(phones), 3))
    targets = spread * [phone.formants for phone in phones]
    formants = [score.at(starts, target) for target in targets.T]
    formants.append(np.full(len(starts), FOURTH_FORMANT))
    frequencies = speaker.tract * np.stack(formants, axis=-1)
    loudness = score.at(starts, [phone.voice for phone in phones])
    amplitudes = np.outer(loudness, speaker.brightness ** np.arange(4))
    amplitudes[frequencies >= SAMPLE_RATE / 2] = 0

    times = np.arange(_indices(PULSE_SECONDS)) / SAMPLE_RATE
    rings = np.exp(-np.pi * np.outer(BANDWIDTHS, times)) * np.sin(
        2 * np.pi * frequencies[..., np.newaxis] * times
    )
    pulses = np.einsum("pf,pft->pt", amplitudes, rings)
    samples = np.zeros(_indices(ends[-1]))
    indices = _indices(starts)[:, np.newaxis] + np.arange(len(times))
    np.add.at(samples, indices, pulses)
    return samples


def _noise(score, *, generator):
    """Returns the noise of fricatives and bursts, filtered by their bands."""
    phones, ends = score
    samples = np.zeros(_indices(ends[-1]))
    times = np.arange(_indices(NOISE_SECONDS)) / SAMPLE_RATE
    bounds = _indices([0, *ends])
    for phone, start, end in zip(phones, bounds, bounds[1:]):
        if phone.noise:
            centre, width = phone.noise_band
            centre *= generator.uniform(0.95, 1.05)
            ring = np.exp(-np.pi * width * times) * np.cos(
                2 * np.pi * centre * times
            )
            white = generator.standard_normal(end - start)
            noise = np.convolve(white, ring / np.linalg.norm(ring))
            samples[start:end] = noise[: end - start]
    times = np.arange(len(samples)) / SAMPLE_RATE
    return samples * score.at(times, [phone.noise for phone in phones])

"""The transformer trainer: WMT's sentences and lists of numbers."""

import itertools
import math

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from examples.common import training
from examples.common.data import streams
from examples.transformer import (
    batches,
    beam_search,
    corpus,
    data,
    model,
    train,
    vocabulary,
)
from tests import harness
from tests.examples import full_size, prepared_fixture

TINY = model.Size(layers=1, width=8, heads=2, inner_width=16, dropout=0.0)
SIZE = data.Size(tokens=64, longest=32, vocabulary=80)
SENTENCES = [
    ("The house is small.", "Das Haus ist klein."),
    ("The garden is large, too.", "Auch der Garten ist groß."),
    ("Two birds sing.", "Zwei Vögel singen."),
    ("We like the house.", "Wir mögen das Haus."),
]


def pairs_of(sentences, name="pairs"):
    return corpus.Pairs(name, len(sentences), lambda: sentences)


def corpus_of(lengths):
    """Returns a corpus: the tokens of pair i are i + 10, the last is END."""
    tokens = []
    for number, pair in enumerate(lengths):
        for length in pair:
            tokens += [number + 10] * (length - 1) + [vocabulary.END]
    bounds = np.concatenate([[0], np.cumsum(np.ravel(lengths))])
    return corpus.Corpus(np.array(tokens, np.uint16), bounds)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """WMT with 40 training pairs, one of which is empty, and 2 test pairs."""

    def examples(sentences):
        return [
            (number, {"en": english, "de": german})
            for number, (english, german) in enumerate(sentences)
        ]

    path = tmp_path_factory.mktemp("prepared")
    prepared_fixture.prepare(
        "wmt14_translate/de-en",
        path,
        {
            "train": examples([*(SENTENCES * 10)[:39], ("Nothing.", " ")]),
            "validation": examples(SENTENCES[2:]),
            "test": examples(SENTENCES[:2]),
        },
    )
    return str(path)


class TestVocabulary:
    def test_decoding_returns_the_text(self):
        texts = list(itertools.chain.from_iterable(SENTENCES))
        tokenizer = vocabulary.trained(texts, size=80)
        ids = vocabulary.encoded(tokenizer, texts)
        assert all(sentence[-1] == vocabulary.END for sentence in ids)
        assert vocabulary.decoded(tokenizer, ids) == texts

    def test_size_bounds_the_tokens(self):
        tokenizer = vocabulary.trained(["ab ab ab cd cd"], size=9)
        # 4 special tokens, a, b, c, d and the space make 9 without a merge.
        assert tokenizer.get_vocab_size() == 9

    def test_other_characters_are_unknown(self):
        tokenizer = vocabulary.trained(["ab"], size=80)
        [ids] = vocabulary.encoded(tokenizer, ["a?"])
        assert ids[-2:] == [vocabulary.UNKNOWN, vocabulary.END]


class TestCorpus:
    def test_sentences_are_concatenated(self):
        tokenizer = vocabulary.trained(["a b"], size=80)
        encoded = corpus.encode(
            pairs_of([("a", "a b"), ("b a b", "b")]), tokenizer, longest=9
        )
        a, b = (vocabulary.encoded(tokenizer, [x])[0][0] for x in "ab")
        end = vocabulary.END
        expected = [a, end, a, b, end, b, a, b, end, b, end]
        assert encoded.tokens.tolist() == expected
        assert encoded.bounds.tolist() == [0, 2, 5, 9, 11]
        assert encoded.lengths.tolist() == [[2, 3], [4, 2]]

    def test_unusable_pairs_are_dropped_and_logged(self, caplog):
        tokenizer = vocabulary.trained(["a b"], size=80)
        sentences = [("a", "b")] * 4 + [("a", " "), ("", "b"), ("a b a", "a")]
        # "a b a" and its END are 4 tokens.
        encoded = corpus.encode(pairs_of(sentences), tokenizer, longest=3)
        assert len(encoded.lengths) == 4
        assert "empty=2, longer_than_3_tokens=1, pairs=7" in caplog.text

    @pytest.mark.parametrize("sentences", [[], [("a", "b"), ("a", "")]])
    def test_useless_data_are_refused(self, sentences):
        tokenizer = vocabulary.trained(["a b"], size=80)
        with harness.refused(
            "`pairs` must have more usable pairs than unusable ones.",
            f"name='pairs', empty={len(sentences) // 2}, ",
        ):
            corpus.encode(pairs_of(sentences), tokenizer, longest=3)


class TestCache:
    def prepared(self, path, sentences=SENTENCES, **settings):
        settings = {"vocabulary_size": 80, "longest": 32, **settings}
        return corpus.prepared(
            pairs_of(sentences), cache_dir=str(path), **settings
        )

    def test_cached_data_are_not_encoded_again(self, tmp_path, monkeypatch):
        made = corpus.prepared(
            pairs_of(SENTENCES), vocabulary_size=80, longest=32
        )
        self.prepared(tmp_path)
        monkeypatch.setattr(corpus, "encode", None)
        tokenizer, kept = self.prepared(tmp_path)
        assert tokenizer.to_str() == made[0].to_str()
        assert isinstance(kept.tokens, np.memmap)
        for name in corpus.Corpus._fields:
            expected = getattr(made[1], name)
            np.testing.assert_array_equal(getattr(kept, name), expected)
            assert getattr(kept, name).dtype == expected.dtype

    @pytest.mark.parametrize(
        "other",
        [
            {"sentences": SENTENCES[::-1]},
            {"vocabulary_size": 60},
            {"longest": 31},
        ],
    )
    def test_other_data_or_settings_have_another_cache(self, tmp_path, other):
        self.prepared(tmp_path)
        self.prepared(tmp_path, **other)
        assert len(list(tmp_path.iterdir())) == 2

    def test_an_interrupted_cache_is_not_used(self, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(np, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.prepared(tmp_path)
        _, kept = self.prepared(tmp_path)
        assert len(kept.lengths) == len(SENTENCES)

    def test_two_workers_write_one_cache(self, tmp_path):
        made = corpus.prepared(
            pairs_of(SENTENCES), vocabulary_size=80, longest=32
        )
        for _ in range(2):
            corpus._write(str(tmp_path / "cache"), *made)
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]


class TestPlan:
    @hypothesis.given(
        lengths=st.lists(st.integers(2, 32), max_size=200),
        scale=st.sampled_from([1, 2, 4]),
        number=st.integers(0, 3),
    )
    def test_every_pair_once_in_steps_of_base_batches(
        self, lengths, scale, number
    ):
        lengths = np.array(lengths, np.int64)
        buckets = batches.bucket_lengths(32)
        kwargs = {"buckets": buckets, "tokens": 64, "scale": scale, "seed": 1}
        steps = batches.plan(lengths, number=number, **kwargs)
        used = [row for _, rows in steps for row in rows]
        assert len(set(used)) == len(used)
        # The last bucket's base batch is of 64 / 32 = 2 pairs.
        assert 0 <= len(lengths) - len(used) < 2 * scale
        for length, rows in steps:
            assert len(rows) == scale * (64 // length)
            assert lengths[rows].max() <= length
        assert len(steps) == len(batches.plan(lengths, number=9, **kwargs))

    def test_passes_and_seeds_differ(self):
        def first(seed, number):
            steps = batches.plan(
                np.full(100, 8),
                buckets=[8],
                tokens=64,
                scale=1,
                seed=seed,
                number=number,
            )
            return steps[0][1].tolist()

        orders = [first(0, 0), first(0, 1), first(1, 0)]
        assert first(0, 0) == orders[0]
        assert len(set(map(tuple, orders))) == 3


class TestTrainDataset:
    # 19 steps of 128 tokens per pass.
    corpus = corpus_of(np.random.default_rng(0).integers(2, 17, (200, 2)))

    def batches(self, batch_size=128, *, count=5, **kwargs):
        dataset = batches.train_dataset(
            self.corpus,
            batch_size,
            buckets=batches.bucket_lengths(16),
            tokens=64,
            **{"seed": 3, **kwargs},
        )
        return [
            [x["source"], x["target"], y]
            for x, y in dataset.take(count).as_numpy_iterator()
        ]

    def test_a_batch_is_micro_batches_of_one_length(self):
        for source, target, labels in self.batches():
            assert source.shape == target.shape == labels.shape
            pairs, length = source.shape
            assert pairs == 2 * (64 // length)

    def test_source_target_and_labels_belong_together(self):
        for source, target, labels in self.batches():
            lengths = self.corpus.lengths
            for row in range(len(source)):
                number = labels[row, 0] - 10
                if number < 0:  # A sentence with only END has no number.
                    continue
                length = lengths[number, 1]
                expected = [number + 10] * (length - 1) + [vocabulary.END]
                assert labels[row, :length].tolist() == expected
                assert not labels[row, length:].any()
                before = [vocabulary.START, *expected[:-1]]
                assert target[row, :length].tolist() == before
                assert source[row, 0] == number + 10
                assert (source[row] > 0).sum() == lengths[number, 0]

    @pytest.mark.parametrize("step", [2, 30])  # 30: in another pass.
    def test_a_run_resumes_at_any_step(self, step):
        whole = self.batches(count=step + 3)
        rest = self.batches(count=3, start=step * 128)
        for expected, found in zip(whole[step:], rest):
            for x, y in zip(expected, found):
                np.testing.assert_array_equal(x, y)

    def test_workers_share_a_batch_by_base_batches(self):
        shares = [
            self.batches(256, share=streams.Share(index, 2)) for index in (0, 1)
        ]
        for whole, *parts in zip(self.batches(256), *shares):
            for x, *y in zip(whole, *parts):
                np.testing.assert_array_equal(x, np.concatenate(y))

    @pytest.mark.parametrize(
        "batch_size, share",
        [(0, (0, 1)), (96, (0, 1)), (192, (0, 2))],
    )
    def test_other_batch_sizes_are_refused(self, batch_size, share):
        with harness.refused(
            f"`batch_size` must be a multiple of 64 * {share[1]} tokens",
            f"batch_size={batch_size}",
        ):
            self.batches(batch_size, share=streams.Share(*share))

    def test_too_few_pairs_are_refused(self):
        with harness.refused(
            "`corpus` must have enough sentence pairs for 64000 tokens.",
            "pairs=200",
        ):
            self.batches(64 * 1000)


def test_test_sentences_keep_their_references():
    sources = [[9] * n for n in (3, 16, 5, 8, 9, 2)]
    references = [str(len(source)) for source in sources]
    found = []
    for ids, texts in batches.test_dataset(
        sources, references, 16, buckets=[8, 16]
    ):
        # 16 tokens: 2 sentences of 8, or 1 of 16.
        assert ids.shape[0] <= 16 // ids.shape[1]
        for row, text in zip(ids.numpy(), texts.numpy()):
            assert (row > 0).sum() == int(text)
            found.append(text.decode())
    assert sorted(found) == sorted(references)


def test_long_test_sentences_are_truncated_and_logged(caplog):
    source = data.Source(
        lambda: pairs_of(SENTENCES),
        lambda: pairs_of([("The", "Das"), ("Two " * 40, "Zwei")], "test"),
        size=SIZE,
    )
    widths = [ids.shape[1] for ids, _ in source.test_dataset(64)]
    assert max(widths) == SIZE.longest
    assert "test: sentences truncated to 32 tokens: 1 of 2" in caplog.text


class TestNumbers:
    def test_no_number_over_100_is_in_two_splits(self):
        training_numbers, test = data.number_splits("test")
        again, validation = data.number_splits("validation")
        np.testing.assert_array_equal(training_numbers, again)
        parts = [set(x.tolist()) for x in (training_numbers, test, validation)]
        assert set.union(*parts) == set(range(1, 10_000))
        assert sum(map(len, parts)) == 9999
        assert set(range(1, 101)) < parts[0]

    def test_train_and_test_share_no_number(self, monkeypatch):
        monkeypatch.setattr(data, "TRAIN_SENTENCES", 300)
        source = data.numbers(split="test")
        _, tested = data.number_splits("test")
        words = {data._german(number) for number in tested.tolist()}
        used = {
            word
            for ids in source.train_dataset(1280, seed=0)
            .take(30)
            .as_numpy_iterator()
            for text in vocabulary.decoded(source.tokenizer, ids[1])
            for word in text.split(", ")
        }
        assert len(used) > 100
        assert not words & used
        for _, references in source.test_dataset(128):
            for text in references.numpy():
                assert set(text.decode().split(", ")) <= words

    def test_commas_only_separate_numbers(self):
        pairs = data._lists("one", np.array([2345]), size=20)
        english = "two thousand three hundred and forty-five"
        german = "zweitausenddreihundertfünfundvierzig"
        found = set(pairs.read())
        assert found == {
            (", ".join([english] * count), ", ".join([german] * count))
            for count in (1, 2, 3)
        }


class TestModel:
    ids = np.random.default_rng(0).integers(4, 20, (3, 6)).astype("int32")

    def transformer(self):
        return model.Transformer(TINY, vocabulary_size=20)

    @pytest.mark.parametrize(
        "size, vocabulary_size, parameters",
        [
            # Attention: 4 512^2 = 1,048,576. Feed-forward: 2 * 512 * 2048 +
            # 2048 + 512 = 2,099,712. A norm: 1024. Encoder layer: attention,
            # feed-forward, 2 norms = 3,150,336. Decoder layer: 2, 1 and 3 =
            # 4,199,936. Embedding: 37,000 * 512 = 18,944,000. In all
            # 6 * (3,150,336 + 4,199,936) + 18,944,000; Vaswani et al., table 3,
            # say 65 * 10^6.
            (model.BASE, 37_000, 63_045_632),
            # 2 * ((16,384 + 33,088 + 256) + (32,768 + 33,088 + 384)) + 12,800
            (model.MINIATURE, 200, 244_736),
        ],
    )
    def test_parameters(self, size, vocabulary_size, parameters):
        with full_size.not_initialized():
            transformer = model.Transformer(
                size, vocabulary_size=vocabulary_size
            )
        assert transformer.count_params() == parameters

    def test_a_checkpoint_has_all_weights(self, tmp_path):
        size = TINY._replace(layers=2)
        one, other = (
            model.Transformer(size, vocabulary_size=20) for _ in range(2)
        )
        path = tf.train.Checkpoint(model=one).write(str(tmp_path / "saved"))
        tf.train.Checkpoint(model=other).read(path).assert_consumed()
        for weight, restored in zip(one.weights, other.weights):
            np.testing.assert_array_equal(weight.numpy(), restored.numpy())

    def test_token_by_token_equals_all_at_once(self):
        transformer = self.transformer()
        inputs = {"source": self.ids, "target": self.ids[::-1]}
        expected = transformer(inputs)
        source = transformer.encode(inputs["source"])
        past = transformer.no_past(3)
        for place in range(6):
            logits, past = transformer.decode(
                inputs["target"][:, place : place + 1], past, source
            )
            np.testing.assert_allclose(
                logits[:, 0], expected[:, place], rtol=1e-5, atol=1e-5
            )

    def test_attention_is_causal(self):
        transformer = self.transformer()
        changed = self.ids.copy()
        changed[:, 3] = 4 + (changed[:, 3] - 3) % 16
        before, after = (
            transformer({"source": self.ids, "target": target}).numpy()
            for target in (self.ids, changed)
        )
        np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
        assert (np.abs(before - after).max(axis=(0, 2))[3:] > 1e-4).all()

    def test_padding_of_the_source_is_not_read(self):
        transformer = self.transformer()
        padded = np.pad(self.ids, [(0, 0), (0, 4)])
        before, after = (
            transformer({"source": source, "target": self.ids}).numpy()
            for source in (self.ids, padded)
        )
        np.testing.assert_allclose(before, after, atol=1e-5)

    def test_sums_are_normalized(self):
        """After each residual, like in the paper: mean 0, variance 1."""
        residual = model.Residual(TINY)
        x = residual(tf.random.normal((2, 3, 8)), 5 * tf.ones((2, 3, 8)))
        np.testing.assert_allclose(tf.reduce_mean(x, -1), 0, atol=1e-5)
        np.testing.assert_allclose(tf.math.reduce_std(x, -1), 1, atol=1e-4)

    def test_dropout_is_on_in_training_only(self):
        transformer = model.Transformer(
            TINY._replace(dropout=0.5), vocabulary_size=20
        )
        inputs = {"source": self.ids, "target": self.ids}
        one, two = (transformer(inputs, training=True) for _ in range(2))
        assert np.abs(one - two).max() > 1e-3
        one, two = (transformer(inputs) for _ in range(2))
        np.testing.assert_array_equal(one, two)

    def test_half_precision_gives_float32_logits(self, monkeypatch):
        monkeypatch.setattr(beam_search, "MORE_THAN_SOURCE", 0)
        keras.config.set_dtype_policy("mixed_bfloat16")
        transformer = self.transformer()
        logits = transformer({"source": self.ids, "target": self.ids})
        assert logits.dtype == tf.float32
        assert transformer.embedding.embeddings.dtype == "float32"
        assert np.isfinite(logits).all()
        assert beam_search.translated(transformer, self.ids).shape[0] == 3


class TestLoss:
    def test_by_hand(self):
        # Softmax of (0, 0, ln 2) is (1/4, 1/4, 1/2). With smoothing 0.3 and
        # label 2 the target is (0.1, 0.1, 0.8):
        # 0.2 ln 4 + 0.8 ln 2 = 1.2 ln 2. The padding does not count.
        logits = tf.constant([[[0.0, 0.0, math.log(2)], [9.0, 0.0, 0.0]]])
        loss = model.SmoothedCrossEntropy(0.3)
        assert float(loss([[2, vocabulary.PADDING]], logits)) == pytest.approx(
            1.2 * math.log(2)
        )

    def test_equals_keras_without_padding(self):
        labels = np.random.default_rng(0).integers(1, 7, (3, 5))
        logits = tf.random.normal((3, 5, 7))
        expected = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=0.1
        )(tf.one_hot(labels, 7), logits)
        found = model.SmoothedCrossEntropy(0.1)(labels, logits)
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


class Chain:
    """Replaces a model: the next token depends only on the last one.

    Tokens increase, so the number of translations is finite.
    """

    size = 10

    def __init__(self, seed):
        generator = np.random.default_rng(seed)
        weights = generator.exponential(size=(self.size, self.size))
        follows = np.tri(self.size, dtype=bool).T & ~np.eye(
            self.size, dtype=bool
        )
        follows[:, vocabulary.END] = True
        follows[:, : vocabulary.END] = False
        weights *= follows
        self.probabilities = weights / weights.sum(axis=1, keepdims=True)

    def encode(self, source):
        return tf.zeros([source.shape[0], 1]), tf.zeros([source.shape[0], 1])

    def no_past(self, rows):
        return [[tf.zeros([rows, 0, 1, 1])] * 2]

    def decode(self, last, past, memory):
        logits = tf.math.log(tf.cast(self.probabilities, tf.float32))
        longer = tf.cast(last[..., tf.newaxis, tf.newaxis], tf.float32)
        past = [[tf.concat([x, longer], axis=1) for x in past[0]]]
        return tf.gather(logits, last), past

    def translations(self, last=vocabulary.START):
        """Yields all (tokens, log probability)."""
        for token in np.flatnonzero(self.probabilities[last]):
            log = math.log(self.probabilities[last, token])
            if token == vocabulary.END:
                yield [int(token)], log
                continue
            for rest, more in self.translations(token):
                yield [int(token), *rest], log + more


class TestBeamSearch:
    @pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
    @pytest.mark.parametrize("seed", range(3))
    def test_a_wide_beam_finds_the_best_of_all(self, alpha, seed):
        chain = Chain(seed)
        best, _ = max(
            chain.translations(),
            key=lambda x: x[1] / ((5 + len(x[0])) / 6) ** alpha,
        )
        found = beam_search.translated(
            chain, tf.ones((2, 3), tf.int32), beams=64, alpha=alpha
        )
        for row in found.numpy().tolist():
            assert row[: len(best)] == best
            assert not any(row[len(best) :])

    def test_a_narrow_beam_is_greedy(self):
        chain = Chain(1)
        greedy = [vocabulary.START]
        while greedy[-1] != vocabulary.END:
            greedy.append(int(chain.probabilities[greedy[-1]].argmax()))
        found = beam_search.translated(
            chain, tf.ones((1, 3), tf.int32), beams=1, alpha=0.0
        )
        # A shorter translation may be more likely than the greedy one.
        score = {tuple(x): log for x, log in chain.translations()}
        row = tuple(x for x in found.numpy()[0].tolist() if x)
        assert score[row] >= score[tuple(greedy[1:])] - 1e-6

    def test_a_translation_without_end_is_cut(self):
        chain = Chain(0)
        chain.probabilities[:] = np.eye(10)[7]
        found = beam_search.translated(chain, tf.ones((1, 3), tf.int32))
        assert found.numpy().tolist() == [[7] * (3 + 50)]


class TestTask:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        """Makes fewer numbers, and translations short."""
        monkeypatch.setattr(data, "TRAIN_SENTENCES", 300)
        monkeypatch.setattr(beam_search, "MORE_THAN_SOURCE", 0)

    def test_bleu_of_the_references_is_100(self, data_dir, tmp_path):
        source = data.wmt(data_dir=data_dir, cache_dir=str(tmp_path), size=SIZE)
        tokenizer = source.tokenizer
        german = dict(SENTENCES)

        def translated(transformer, ids):
            """Replaces a model that has memorized the sentences."""

            def look_up(ids):
                texts = [
                    german[text]
                    for text in vocabulary.decoded(tokenizer, ids.tolist())
                ]
                found = vocabulary.encoded(tokenizer, texts)
                width = max(map(len, found))
                return np.array(
                    [x + [0] * (width - len(x)) for x in found], np.int32
                )

            return tf.numpy_function(look_up, [ids], tf.int32)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beam_search, "translated", translated)
            metrics = train.evaluate(
                None, source.test_dataset(64), tokenizer=tokenizer
            )
        assert metrics == {"bleu": pytest.approx(100)}

    def test_validation_is_on_another_split(self, data_dir, tmp_path):
        task = train.task(
            data="tfds",
            data_dir=data_dir,
            split="validation",
            cache_dir=str(tmp_path),
            size=SIZE,
        )
        assert task.name == "transformer-tfds-validation"
        references = {
            text.decode()
            for _, texts in task.test_dataset(64).as_numpy_iterator()
            for text in texts
        }
        assert references == {german for _, german in SENTENCES[2:]}

    def test_schedule_falls_where_the_paper_says(self, data_dir, tmp_path):
        task = train.task(
            data="tfds", data_dir=data_dir, cache_dir=str(tmp_path), size=SIZE
        )
        assert task.total_steps == 1_550_000
        for total_steps, last in [(1_550_000, 1_440_000), (155, 144)]:
            schedule = task.schedule(total_steps)
            rates = [float(schedule(step)) for step in (0, last, last + 1)]
            np.testing.assert_allclose(rates, [0.01, 0.01, 0.001], rtol=1e-6)
        optimizer = task.optimizer(0.01)
        assert (optimizer.momentum, optimizer.nesterov) == (0.99, False)
        assert task.loss().smoothing == 0.1

    def test_adamw_warms_up_and_decays(self):
        task = train.task(optimizer="adamw", split="validation")
        # The name differs from that of SGD.
        assert task.name == "transformer-validation-adamw"
        assert task.total_steps == 4000
        # Up to 0.001 in a tenth of the steps, then half a period of a cosine.
        schedule = task.schedule(100)
        rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
        np.testing.assert_allclose(
            rates, [0.0, 0.0005, 0.001, 0.0005, 0.0], atol=1e-9
        )
        # Too short to warm up.
        assert float(task.schedule(1)(0)) == pytest.approx(0.001)
        higher = train.task(optimizer="adamw", learning_rate=0.5)
        assert float(higher.schedule(100)(10)) == pytest.approx(0.5)

    def test_adamw_decays_kernels_and_embeddings(self):
        task = train.task(optimizer="adamw")
        transformer = task.model()
        optimizer = task.optimizer(0.001)
        assert isinstance(optimizer, keras.optimizers.AdamW)
        assert optimizer.beta_2 == 0.98
        optimizer.build(transformer.trainable_variables)
        decaying = {
            variable.name
            for variable in transformer.trainable_variables
            if optimizer._use_weight_decay(variable)
        }
        assert decaying == {"kernel", "embeddings"}

    def test_optimizers_without_a_recipe_are_refused(self):
        for given in [
            {"data": "tfds", "optimizer": "adamw"},
            {"optimizer": "adam"},
        ]:
            with harness.refused(
                "`data` and `optimizer` must be one of",
                f"data={given.get('data', 'embedded')!r}, "
                f"optimizer={given['optimizer']!r}",
            ):
                train.task(**given)

    def test_unprepared_data_are_refused(self, tmp_path):
        with harness.refused(
            "`data_dir` must contain the prepared dataset wmt14_translate/de-en"
        ):
            train.task(data="tfds", data_dir=str(tmp_path)).model()

    def test_full_size_fits_its_data(self, data_dir, tmp_path):
        task = train.task(
            data="tfds", data_dir=data_dir, cache_dir=str(tmp_path), size=SIZE
        )
        full_size.model_that_fits(task, 64)

    def test_replicas_share_batches_of_any_length(
        self, data_dir, tmp_path, strategy_of, monkeypatch
    ):
        # The strategy of the flags uses collectives. A process can have only
        # one group of them.
        monkeypatch.setattr(
            training.strategies, "make", lambda *_, **__: strategy_of(2)
        )
        task = train.task(
            data="tfds", data_dir=data_dir, cache_dir=str(tmp_path), size=SIZE
        )._replace(model=lambda: model.Transformer(TINY, vocabulary_size=80))
        result = training.run(
            task,
            training.Settings(
                scale=4,
                total_steps=4,
                model_dir=str(tmp_path / "run"),
            ),
        )
        assert 1 <= result.mean_gain <= 4

"""The program of a TPU core, before XLA optimises it."""

import pytest
import tensorflow as tf

from tests.tpu import lowering, programs, stub_strategy

Value = lowering.Value

# Sizes of the image model's weights: two convolutions, each with a bias and two
# weights of its normalisation, and a dense layer.
FEW = [16, 16, 16, 32, 32, 32, 10]
MANY = [3 * 3 * 3 * 16, 3 * 3 * 16 * 32, 32 * 10]


def reduced(name):
    """Returns all values that a program's all-reduces sum."""
    found = lowering.all_reduced(programs.stablehlo(name))
    return sorted(value for values in found for value in values)


@pytest.mark.parametrize(
    "name", ["SGD", "SGD, 4 micro-batches", "SGD, bfloat16", "AdamW"]
)
def test_each_weight_is_summed_once(name):
    assert reduced(name) == sorted(Value("f32", n) for n in FEW + MANY)


@pytest.mark.parametrize("name", programs.BASELINES)
class TestAdaScale:
    def test_sums_at_most_a_scalar_more(self, name):
        # The difference of two steps needs no further sum.
        scalars = 0 if name == "AdaScale, differenced" else 1
        assert reduced(name) == sorted(
            reduced(programs.BASELINES[name]) + [Value("f32", 1)] * scalars
        )

    def test_sends_nothing_else(self, name):
        """Keras sends its count of iterations to all cores."""
        own, baseline = (
            lowering.num_all_to_alls(programs.stablehlo(n))
            for n in (name, programs.BASELINES[name])
        )
        assert own == 0
        assert baseline == 1

    def test_has_no_further_integers_of_64_bits_but_counters(self, name):
        """TPUs compute with 32 bits."""
        own, baseline = (
            lowering.types(programs.stablehlo(n))
            for n in (name, programs.BASELINES[name])
        )
        wide = {kind for kind in own - baseline if kind.endswith("i64")}
        assert wide <= {"i64"}


@pytest.mark.parametrize("name", [n for n in programs.PROGRAMS if "sum" in n])
def test_adasum(name):
    cores = stub_strategy.CORES
    expected = [
        *FEW,
        *MANY,
        len(MANY) * cores**2,  # Inner products.
        # A sum gathers these: the other cores add zeros. A core's index goes
        # with its part.
        cores * (sum(MANY) + 1),
        cores * (len(FEW) * 32 + 1),  # Rows, padded with zeros.
    ]
    if name != "Adasum of gradients":
        expected.append(1)  # Whether all updates are finite.
    assert reduced(name) == sorted(Value("f32", n) for n in expected)


def test_bytes():
    assert Value("bf16", 3).bytes == 6
    assert Value("f32", 3).bytes == 12


@pytest.fixture(scope="module")
def strategy():
    return stub_strategy.tpu_strategy()


def printed(x):
    tf.print(tf.reduce_sum(x))
    return x


def of_python(x):
    return tf.ensure_shape(tf.py_function(tf.abs, [x], x.dtype), x.shape)


def of_text(x):
    return x + tf.strings.to_number(tf.as_string(x))


def in_float64(x):
    return tf.cast(tf.cast(x, tf.float64) * 2, x.dtype)


def of_some(x):
    return x + tf.reduce_mean(tf.boolean_mask(x, x > 0))


def of_a_library(x):
    return x + tf.linalg.qr(x)[0]


def summed_sometimes(x):
    context = tf.distribute.get_replica_context()
    return tf.cond(
        tf.reduce_sum(x) > 0, lambda: context.all_reduce("sum", x), lambda: x
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (printed, r"XLA does not compile.*operations=\['StringFormat'\]"),
        (of_python, r"XLA does not compile.*operations=\['EagerPyFunc'\]"),
        (of_text, r"XLA does not compile.*operations=\['AsString'"),
        (summed_sometimes, r"inside a condition.*\['CrossReplicaSum'\]"),
        (in_float64, r"float64.* Received: .*xf64>"),
        (of_some, r"depend on the data.* Received: .*<\?x"),
        (of_a_library, r"outside of the program.* Received: .*custom_call @Qr"),
    ],
)
def test_refuses_a_step_that_is(function, message, strategy):
    with strategy.scope():
        model = programs.image_model(programs.adascale())

    def step(x, y):
        return model.train_step((function(x), y))

    with pytest.raises(lowering.UnfitForTPUError, match=message):
        lowering.lowered(strategy, step, *programs.image_batch())


def test_refuses_two_programs(strategy):
    class Twice:
        def run(self, function, args):
            strategy.run(function, args)
            return strategy.run(function, args)

    with pytest.raises(
        ValueError,
        match=r"no one program to compile\. Expected a step in one "
        r"`strategy\.run`\. Received: 2 of them",
    ):
        lowering.lowered(Twice(), tf.abs, tf.TensorSpec((3,)))

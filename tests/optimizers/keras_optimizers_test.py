"""Every optimizer of `keras.optimizers`: followed to the bit, or refused.

The table in docs/inner_optimizers.md is generated here. If it differs, the
failed test shows it.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness, sources
from tf_adascale import AdamScale, AdaScale, Adasum

PAGE = "docs/inner_optimizers.md"
HEAD = "| `keras.optimizers` | wrapper | power of the gain |\n|---|---|---|\n"

NAMES = sorted(
    name
    for name, member in vars(keras.optimizers).items()
    if inspect.isclass(member)
    and issubclass(member, keras.optimizers.Optimizer)
    and member is not keras.optimizers.Optimizer
)


def make(name, **arguments):
    """Returns an optimizer of this name."""
    optimizers = keras.optimizers
    if name == "LossScaleOptimizer":
        return optimizers.LossScaleOptimizer(optimizers.SGD(0.01))
    if name == "MultiOptimizer":
        return optimizers.MultiOptimizer(
            optimizers.OptimizerMap(optimizers.SGD(0.01))
        )
    return getattr(optimizers, name)(0.01, **arguments)


def is_accepted(wrap, name):
    """Returns whether a wrapper takes an optimizer."""
    try:
        wrap(make(name))
    except ValueError as error:
        if "`inner_optimizer` must" not in str(error):
            raise
        return False
    return True


def row(name):
    """Returns the table's row of an optimizer."""
    accepted = is_accepted(AdaScale, name)
    assert is_accepted(Adasum, name) == accepted
    if not accepted:
        return f"| `{name}` | refused | |\n"
    if name == "LossScaleOptimizer":
        return f"| `{name}` | that of the optimizer inside it | |\n"
    if name == "SGD":
        return f"| `{name}` | `AdaScale`, `Adasum` | 1 |\n"
    if is_accepted(AdamScale, name):
        return f"| `{name}` | `AdamScale`, `Adasum` | 1/2 |\n"
    return f"| `{name}` | `AdaScale(power=0.5)`, `Adasum` | 1/2 |\n"


def table():
    """Returns the table of all optimizers."""
    return HEAD + "".join(map(row, NAMES))


@pytest.mark.skipif(
    keras.version() < "3.15", reason="The table is that of Keras 3.15."
)
def test_the_table_is_in_the_documentation():
    assert table() in sources.text(PAGE), f"{PAGE} needs\n\n{table()}"


FOLLOWED = [name for name in NAMES if name != "MultiOptimizer"]
if keras.version() < "3.15":
    FOLLOWED.remove("Muon")  # It looks for the path of a TensorFlow variable.

# Settings that all of Keras's optimizers take.
SETTINGS = {
    "default": {},
    "decay": {"weight_decay": 0.1, "clipnorm": 1.0, "use_ema": True},
}

PATHS = ("embedding/table", "hidden/kernel", "hidden/bias", "out/kernel")
SHAPES = ((5, 3), (3, 4), (4,), (4, 2))


def variables():
    """Returns variables of which Muon steps some in each of its ways."""
    random = np.random.default_rng(0)
    made = []
    for path, shape in zip(PATHS, SHAPES):
        layer, name = path.split("/")
        with keras.name_scope(layer):
            value = random.normal(size=shape)
            made.append(keras.Variable(value, dtype="float32", name=name))
    return made


def trained(optimizer, *, steps=6):
    """Returns variables after steps, one gradient of which is sparse."""
    weights = variables()
    random = np.random.default_rng(1)
    for _ in range(steps):
        gradients = [
            tf.constant(random.normal(size=shape), "float32")
            for shape in SHAPES
        ]
        # A row may come twice.
        gradients[0] = tf.IndexedSlices(
            gradients[0][:3], random.integers(0, 5, 3), (5, 3)
        )
        optimizer.apply(gradients, weights)
    return weights


@pytest.mark.parametrize("wrap", [AdaScale, Adasum])
@pytest.mark.parametrize(
    "name, settings",
    [
        (name, settings)
        for name in FOLLOWED
        for settings in SETTINGS
        if name != "LossScaleOptimizer" or settings == "default"
    ],
)
def test_one_sample_is_the_optimizer_to_the_bit(name, settings, wrap):
    settings = SETTINGS[settings]
    plain, wrapped = make(name, **settings), wrap(make(name, **settings))
    theirs = trained(plain)
    harness.assert_same(trained(wrapped), theirs)
    for x, y in zip(
        wrapped.inner_optimizer.variables, plain.variables, strict=True
    ):
        np.testing.assert_array_equal(harness.first(x), harness.first(y))


@pytest.mark.skipif(
    keras.version() < "3.15", reason="On TensorFlow, Keras 3.10's Muon fails."
)
class TestMuon:
    """It decays weights by one of two numbers, and steps them in two ways."""

    @staticmethod
    def make():
        return keras.optimizers.Muon(
            0.01,
            weight_decay=0.3,
            adam_weight_decay=0.2,
            exclude_layers=["out"],
        )

    @pytest.mark.parametrize("wrap", [AdaScale, Adasum])
    def test_both_of_its_rules(self, wrap):
        harness.assert_same(trained(wrap(self.make())), trained(self.make()))

    def test_excluded_from_weight_decay(self):
        pair = self.make(), AdaScale(self.make())
        for optimizer in pair:
            optimizer.exclude_from_weight_decay(var_names=["bias", "kernel"])
        harness.assert_same(trained(pair[1]), trained(pair[0]))

    def test_on_replicas_with_equal_gradients(self):
        def run_of(num_replicas):
            return harness.Run(num_replicas, lambda: AdaScale(self.make()))

        one, two = run_of(1), run_of(2)
        for gradients in harness.random_gradients(4):
            one.step(gradients)
            two.step([np.repeat(g, 2, 0) for g in gradients])
        harness.assert_close(two.weights(), one.weights())


@pytest.mark.skipif(
    "MultiOptimizer" not in NAMES, reason="Keras 3.10 has no MultiOptimizer."
)
@pytest.mark.parametrize("wrap", [AdaScale, AdamScale, Adasum])
def test_multi_optimizer_is_refused_by_name(wrap):
    rule = "`inner_optimizer` must not override keras.optimizers.Optimizer."
    with harness.refused(rule, "inner_optimizer=<keras") as raised:
        wrap(make("MultiOptimizer"))
    assert "MultiOptimizer" in str(raised.value)

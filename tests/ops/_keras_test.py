"""Objects of Keras 2, which TF_USE_LEGACY_KERAS=1 puts in place of Keras 3."""

import sys
import types

import keras
import pytest

import tf_adascale
from tests import harness

# tf_keras is not installed: its objects are told by the module of their class.
Legacy = type("SGD", (), {"__module__": "tf_keras.src.optimizers.sgd"})
Derived = type("Derived", (Legacy,), {})


@pytest.mark.parametrize("cls", [Legacy, Derived])
def test_is_refused_in_an_optimizer(cls):
    rule = "`inner_optimizer` must hold objects of Keras 3. tf_keras, which"
    for wrap in (
        tf_adascale.AdaScale,
        tf_adascale.AdamScale,
        tf_adascale.Adasum,
    ):
        with harness.refused(rule, "inner_optimizer with"):
            wrap(cls())


def test_is_refused_in_a_model():
    rule = "must hold objects of Keras 3"
    with harness.refused(rule, "inputs with"):
        tf_adascale.Model([Legacy()], keras.Input((2,)))
    with harness.refused(rule, "outputs with"):
        tf_adascale.Model(inputs=keras.Input((2,)), outputs={"a": Legacy()})

    class Subclassed(tf_adascale.Model):
        def __init__(self, optimizer):
            super().__init__()
            self.dense = Legacy() if optimizer == "sgd" else None
            self.compile(optimizer)

    with harness.refused(f"`layers` {rule}", "layers with"):
        Subclassed("sgd")
    with harness.refused(f"`optimizer` {rule}", "optimizer with"):
        Subclassed(Legacy())


def test_keras_2_is_told_by_the_text_of_an_optimizer(monkeypatch):
    """Its error ends in the text of the optimizer that it refuses."""
    optimizer = tf_adascale.AdaScale(keras.optimizers.SGD())
    assert str(optimizer) == repr(optimizer)
    monkeypatch.setitem(sys.modules, "tf_keras", types.ModuleType("tf_keras"))
    assert str(optimizer).startswith(repr(optimizer))
    assert "is an optimizer of Keras 3 and not of tf_keras" in str(optimizer)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    rule = "`keras.backend.backend()` must be 'tensorflow' for tf_adascale: set"
    calls = (
        lambda: tf_adascale.Model(),
        lambda: tf_adascale.Adasum(keras.optimizers.SGD()),
        lambda: tf_adascale.schedules.SqrtScaling(0.5, scale=2),
    )
    for call in calls:
        with harness.refused(rule, "keras.backend.backend()='jax'"):
            call()

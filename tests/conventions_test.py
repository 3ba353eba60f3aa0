"""Checks tf_adascale against the conventions in CONTRIBUTING.md."""

import ast
import copy
import functools
import inspect
import json
import re

import keras
import pytest

import tf_adascale
from tests import sources
from tf_adascale import AdamScale, AdaScale, Adasum, ops, schedules

# The public surface: tf_adascale, and its public modules.
PUBLIC = {
    "tf_adascale": "AdaScale AdamScale Adasum Model callbacks forecast ops "
    "schedules",
    "tf_adascale.callbacks": "Checkpoint ScalingLog StopAtScaleInvariantStep",
    "tf_adascale.forecast": "Record Row iterations picture read rows "
    "scale_at_efficiency table write_csv",
    "tf_adascale.ops": "adasum ema gain norms",
    "tf_adascale.schedules": "LegwScaling LinearScaling "
    "LinearScalingWithWarmup SqrtScaling TimeScaling scaled_iterations",
}

# Commands may print.
COMMANDS = {"tf_adascale/forecast/__main__.py"}

FORBIDDEN = re.compile(
    r"print$|breakpoint$|os\.(environ|getenv|putenv)|logging\.|absl\.|flags\."
)


def _decay():
    return keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)


def _sgd():
    return keras.optimizers.SGD(_decay(), momentum=0.9, clipnorm=1.0)


def _adam():
    return keras.optimizers.AdamW(_decay(), beta_1=0.5)


_ADASCALE = {
    "scale": 4.0,
    "estimator": "ratio",
    "smoothing": 0.5,
    "power": 0.75,
    "scale_ema": False,
    "name": "another",
}

# The classes registered with Keras. Each has a function that makes its first
# argument, and a value for each keyword that is not its default.
SERIALIZABLE = {
    AdaScale: (_adam, {**_ADASCALE, "preconditioned": True}),
    AdamScale: (_adam, {**_ADASCALE, "preconditioned": False}),
    Adasum: (_sgd, {"combine": "gradients", "group_size": 2, "name": "other"}),
    schedules.LegwScaling: (_decay, {"scale": 4, "warmup_steps": 3}),
    schedules.LinearScaling: (_decay, {"scale": 4}),
    schedules.LinearScalingWithWarmup: (
        _decay,
        {
            "scale": 4,
            "total_steps": 100,
            "iterations": 40,
            "family": "step",
            "warmup": 0.25,
        },
    ),
    schedules.SqrtScaling: (_decay, {"scale": 4}),
    schedules.TimeScaling: (_decay, {"scale": 4}),
}


def _module(name):
    return functools.reduce(getattr, name.split(".")[1:], tf_adascale)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    declared = set(_module(name).__all__) - {"__version__"}
    assert declared == set(PUBLIC[name].split())


def test_completion_shows_the_public_names():
    shown = {name for name in dir(tf_adascale) if not name.startswith("_")}
    assert shown == set(PUBLIC["tf_adascale"].split())


def test_version_is_a_release_in_the_changelog():
    assert f"## [{tf_adascale.__version__}]" in sources.text("CHANGELOG.md")


def _public_objects():
    """Returns the public classes and functions by their dotted names."""
    objects = {}
    for name in (*PUBLIC, *(f"tf_adascale.ops.{n}" for n in ops.__all__)):
        module = _module(name)
        for member, value in vars(module).items():
            public = not member.startswith("_") and callable(value)
            if public and value.__module__.startswith(module.__name__):
                objects[f"{name}.{member}"] = value
    return objects


@pytest.mark.parametrize("name", sorted(_public_objects()))
def test_public_objects_have_an_example(name):
    value = _public_objects()[name]
    # Functions that return a named tuple have the example.
    is_record = inspect.isclass(value) and issubclass(value, tuple)
    assert ("" if is_record else ">>> ") in value.__doc__


def _public_functions(body, prefix=""):
    """Yields public functions and methods with their dotted names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if node.name.startswith("_") and node.name != "__init__":
                continue
            if isinstance(node, ast.ClassDef):
                yield from _public_functions(node.body, f"{name}.")
            else:
                yield name, node


@pytest.mark.parametrize("path", sources.LIBRARY)
def test_public_functions_are_annotated(path):
    lacking = []
    for name, node in _public_functions(sources.tree(path).body):
        parameters = node.args.posonlyargs + node.args.args
        if "." in name:
            parameters = parameters[1:]  # self
        others = [*node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        parameters += [p for p in others if p]
        lacking += [f"{name}({p.arg})" for p in parameters if not p.annotation]
        returns = any(
            isinstance(part, ast.Return) and part.value
            for part in ast.walk(node)
        )
        if returns and not node.returns:
            lacking.append(f"{name} -> ?")
    assert not lacking, f"{path} lacks annotations: {lacking}"


def _message(call, constants):
    """Returns a call's text, with {} for formatted values."""
    parts = []
    for argument in call.args[:1]:
        for part in getattr(argument, "values", [argument]):
            value = getattr(part, "value", "")
            value = constants.get(getattr(value, "id", None), value)
            parts.append(value if isinstance(value, str) else "{}")
    return "".join(parts)


def _constants(tree):
    """Returns the values of a module's constants, by name."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


@pytest.mark.parametrize("path", sources.LIBRARY)
def test_errors_name_the_argument_and_what_was_received(path):
    constants = _constants(sources.tree(path))
    for node in ast.walk(sources.tree(path)):
        is_call = isinstance(node, ast.Call)
        if is_call and sources.dotted(node.func) == "ValueError":
            sentences = re.split("[.?] ", _message(node, constants))
            assert re.search("`.+`.* must ", sentences[0]), (
                f"{path}:{node.lineno}: the first sentence of a ValueError "
                "names the argument in backticks, and says what it must be."
            )
            assert re.fullmatch("Received: .*[^.]", sentences[-1]), (
                f'{path}:{node.lineno}: the last sentence is "Received: '
                'name=value", without a full stop.'
            )


@pytest.mark.parametrize("path", sorted(set(sources.LIBRARY) - COMMANDS))
def test_library_leaves_the_process_alone(path):
    """It uses no assert, print, logging, environment variable or flag."""
    modules = {name.split(".")[0] for name in sources.imported(path)}
    assert not modules & {"absl", "logging"}
    for node in ast.walk(sources.tree(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), (
            f"{where}: raise an error instead; python -O removes an assert."
        )
        name = sources.dotted(node) or ""
        assert not FORBIDDEN.match(name), f"{where} uses {name}."


def test_nothing_is_left_to_do():
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME"]))
    for path in map(str, [*sources.ROOT.glob("*.md"), "BUILD", "Makefile"]):
        assert not marks.search(sources.text(path)), path
    for folder in sources.FOLDERS:
        for path in sources.files(folder):
            assert not marks.search(sources.text(path)), path


def _round_trip(instance):
    """Returns an object's configuration, and that of the object made of it."""
    config = json.loads(
        json.dumps(keras.saving.serialize_keras_object(instance))
    )
    # A copy, because Keras changes the dict.
    restored = keras.saving.deserialize_keras_object(copy.deepcopy(config))
    assert type(restored) is type(instance)
    again = keras.saving.serialize_keras_object(restored)
    return config, json.loads(json.dumps(again))


def test_registered_classes_are_in_the_table():
    registered = {
        value
        for name, value in keras.saving.get_custom_objects().items()
        if name.startswith("tf_adascale>")
    }
    assert {cls for cls in registered if not issubclass(cls, keras.Model)} == (
        set(SERIALIZABLE)
    )


@pytest.mark.parametrize("cls", SERIALIZABLE)
def test_config_round_trip(cls):
    make, arguments = SERIALIZABLE[cls]
    parameters = inspect.signature(cls).parameters.values()
    defaults = {
        p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY
    }
    assert set(arguments) == set(defaults)
    assert all(arguments[name] != defaults[name] for name in arguments)
    config, again = _round_trip(cls(make(), **arguments))
    assert again == config
    assert arguments.items() <= config["config"].items()


def test_config_round_trip_of_a_model():
    inputs = keras.Input((3,))
    model = tf_adascale.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile(AdaScale(_sgd(), scale=2), "mse", microbatches=2)
    config, again = _round_trip(model)
    assert again == config

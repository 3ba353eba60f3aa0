"""Holds the repository to its conventions; CONTRIBUTING.md says them in words.

A failure says what to change: in the code, in BUILD, or in the tables at the
top of this file.
"""

import ast
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import keras
import pytest

import tf_adascale

ROOT = pathlib.Path(__file__).parent.parent

# tf_adascale.__all__: the public surface.
PUBLIC_NAMES = {
    "AdaScale",
    "Adasum",
    "Model",
    "adasum",
    "callbacks",
    "ema",
    "forecast",
    "gain",
    "norms",
    "schedules",
}

# A module imports modules of lower layers only.
LAYERS = {
    "__init__": 5,
    "forecast/__main__": 5,
    "adascale": 4,
    "adasum_optimizer": 4,
    "callbacks": 4,
    "forecast/__init__": 4,
    "model": 4,
    "schedules": 4,
    "wrapper": 3,
    "stepping": 2,
    "checkpoints": 0,
    "loss_scale": 1,
    "preconditioner": 1,
    "replicas": 1,
    "adasum": 0,
    "ema": 0,
    "gain": 0,
    "microbatches": 0,
    "norms": 0,
    "version": 0,
}

# The only modules that may name `tf.distribute` or `tf.__internal__`.
KNOW_DISTRIBUTE = {"replicas"}

# The only modules that may use underscore attributes that are not ours.
KNOW_KERAS_INTERNALS = {"model", "preconditioner", "stepping", "wrapper"}

# Modules of which nothing can be tested but that they are there.
UNTESTED = {"__init__", "version"}

# Commands, which may print; that is all they are for.
COMMANDS = {"forecast/__main__"}

# What the library may import, beside itself and the standard library.
REQUIREMENTS = {"keras", "numpy", "tensorflow"}

# What single functions import, and say how to install.
OPTIONAL = {"matplotlib"}


def _decay():
    return keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)


def _model():
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(2)(inputs)
    model = tf_adascale.Model(inputs, outputs)
    model.compile(optimizer=tf_adascale.AdaScale(_sgd(), scale=2), loss="mse")
    return model


def _sgd():
    return keras.optimizers.SGD(_decay(), momentum=0.9, clipnorm=1.0)


# An object of each class that is registered with Keras, no argument at its
# default.
SERIALIZABLE = {
    "AdaScale": lambda: tf_adascale.AdaScale(
        keras.optimizers.AdamW(_decay(), beta_1=0.5),
        scale=4,
        estimator="ratio",
        smoothing=0.5,
        power=0.5,
        preconditioned=True,
        scale_ema=False,
        name="another",
    ),
    "Adasum": lambda: tf_adascale.Adasum(
        _sgd(), combine="gradients", group_size=2, name="another"
    ),
    "LegwScaling": lambda: tf_adascale.schedules.LegwScaling(
        _decay(), scale=4, warmup_steps=3
    ),
    "LinearScaling": lambda: tf_adascale.schedules.LinearScaling(
        _decay(), scale=4
    ),
    "LinearScalingWithWarmup": (
        lambda: tf_adascale.schedules.LinearScalingWithWarmup(
            _decay(),
            scale=4,
            total_steps=100,
            iterations=40,
            family="step",
            warmup=0.25,
        )
    ),
    "Model": _model,
    "SqrtScaling": lambda: tf_adascale.schedules.SqrtScaling(_decay(), scale=4),
    "TimeScaling": lambda: tf_adascale.schedules.TimeScaling(_decay(), scale=4),
}

FOLDERS = ("tf_adascale", "tests", "examples", "benchmarks")
TEXTS = {".py", ".md", ".toml", ".in", ""}


def _relative(path):
    return path.relative_to(ROOT).as_posix()


def _python_files(folder):
    return sorted(_relative(p) for p in (ROOT / folder).rglob("*.py"))


# The modules of the library: "gain", "forecast/__init__".
LIBRARY = [
    path.removeprefix("tf_adascale/").removesuffix(".py")
    for path in _python_files("tf_adascale")
]

# An empty __init__.py marks a package and has nothing to depend on.
BUILT = [
    path
    for folder in FOLDERS
    for path in _python_files(folder)
    if (ROOT / path).read_text().strip()
]


def _tree(path):
    return ast.parse((ROOT / path).read_text(), path)


def _library_tree(name):
    return _tree(f"tf_adascale/{name}.py")


def _dotted(node):
    """Returns "tf.distribute.Strategy" for the expression, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value)
        return value and f"{value}.{node.attr}"
    return None


def _imported(tree):
    """Returns the imported modules, and names that may be modules, dotted."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _file_of(name, importer):
    """Returns the repository's file that an import of a name reads, or None."""
    parts = name.split(".")
    # `import golden` in tests/ reads tests/golden.py.
    for folder in (ROOT, (ROOT / importer).parent):
        # The last part may be a module or something inside one.
        for end in (len(parts), len(parts) - 1):
            module = folder.joinpath(*parts[:end])
            for path in (module.with_suffix(".py"), module / "__init__.py"):
                if end and path.is_file():
                    return _relative(path)
    return None


# BUILD.


def _expected_target(path):
    tree = _tree(path)
    files = {_file_of(name, path) for name in _imported(tree)} & set(BUILT)
    if path.endswith("_test.py"):
        rule = "py_test"
    elif 'if __name__ == "__main__":' in (ROOT / path).read_text():
        rule = "py_binary"
    else:
        rule = "py_library"
    deps = [":" + file.removesuffix(".py") for file in sorted(files - {path})]
    target = {"name": path.removesuffix(".py"), "srcs": [path], "deps": deps}
    return rule, target


def _stanza(rule, target):
    """Returns the target as it should stand in BUILD."""
    lines = [f"{rule}("]
    for key, value in target.items():
        if key != "deps" or len(value) == 1:
            lines.append(f"    {key} = {json.dumps(value)},")
        elif value:
            lines += [f"    {key} = ["]
            lines += [f"        {json.dumps(dep)}," for dep in value]
            lines += ["    ],"]
    return "\n".join([*lines, ")"])


def _declared_targets():
    targets = {}
    for statement in ast.parse((ROOT / "BUILD").read_text(), "BUILD").body:
        call = statement.value
        if not isinstance(call, ast.Call) or not call.func.id.startswith("py_"):
            continue
        target = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        assert target["name"] not in targets, (
            f"BUILD has the target {target['name']} twice."
        )
        targets[target["name"]] = call.func.id, {"deps": [], **target}
    return targets


@pytest.mark.parametrize("path", BUILT)
def test_build_has_the_target_of_each_file(path):
    rule, target = _expected_target(path)
    declared = _declared_targets().get(target["name"])
    assert declared == (rule, target), (
        f"BUILD does not agree with the imports of {path}. Its target must be\n"
        f"\n{_stanza(rule, target)}\n"
    )


def test_build_has_no_target_without_a_file():
    known = {path.removesuffix(".py") for path in BUILT}
    surplus = sorted(set(_declared_targets()) - known)
    assert not surplus, f"Remove from BUILD the targets {surplus}."


# Layers.


def test_every_module_has_a_layer():
    assert set(LIBRARY) == set(LAYERS), (
        "Give each module of tf_adascale its layer in LAYERS, in this file."
    )


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_imports_point_down(name):
    path = f"tf_adascale/{name}.py"
    for imported in sorted(_imported(_tree(path))):
        file = _file_of(imported, path)
        if file is None:
            top = imported.split(".")[0]
            allowed = REQUIREMENTS | OPTIONAL | set(sys.stdlib_module_names)
            assert top in allowed, (
                f"{path} imports {imported}. The library requires nothing but "
                f"{sorted(REQUIREMENTS)}."
            )
            continue
        assert file.startswith("tf_adascale/"), (
            f"{path} imports {file}, which is not installed with it."
        )
        below = file.removeprefix("tf_adascale/").removesuffix(".py")
        layer = LAYERS.get(below)
        assert layer is not None, f"LAYERS, in this file, lacks {below}."
        assert layer < LAYERS[name], (
            f"{path} is in layer {LAYERS[name]} and imports {file} of layer "
            f"{layer}. Imports point down only."
        )


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - KNOW_DISTRIBUTE))
def test_only_replicas_knows_distribution(name):
    used = {
        dotted
        for node in ast.walk(_library_tree(name))
        if (dotted := _dotted(node))
        and dotted.startswith(("tf.distribute", "tf.__internal__"))
    } | {
        imported
        for imported in _imported(_library_tree(name))
        if imported.startswith("tensorflow.")
    }
    assert not used, f"{name}.py uses {sorted(used)}; put that in replicas.py."


def _defined_names(tree):
    """Returns the names of all that a module defines or assigns."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(
            node.ctx, ast.Store
        ):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - KNOW_KERAS_INTERNALS))
def test_few_modules_know_keras_internals(name):
    ours = set().union(*(_defined_names(_library_tree(n)) for n in LIBRARY))
    ours |= {"_asdict", "_fields", "_make", "_replace"}  # NamedTuple's public
    used = {
        node.attr
        for node in ast.walk(_library_tree(name))
        if isinstance(node, ast.Attribute)
        and re.match("_(?!_)", node.attr)
        and node.attr not in ours
    } | {
        imported
        for imported in _imported(_library_tree(name))
        if imported.startswith("keras.src")
    }
    assert not used, (
        f"{name}.py uses {sorted(used)}, which the library does not define. "
        f"Only {sorted(KNOW_KERAS_INTERNALS)} may lean on what Keras does not "
        "document."
    )


# Files.


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - UNTESTED))
def test_every_module_has_its_test(name):
    test = f"tests/{name.split('/')[0]}_test.py"
    assert (ROOT / test).is_file(), f"tf_adascale/{name}.py needs a {test}."


def test_nothing_is_left_to_do():
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME"]))
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in paths:
        if path.suffix in TEXTS and "__pycache__" not in path.parts:
            found = marks.findall(path.read_text("utf-8"))
            assert not found, f"{_relative(path)} has {found}."


FORBIDDEN_NAMES = re.compile(
    r"print$|breakpoint$|os\.(environ|getenv|putenv)|logging\.|absl\.|flags\."
)


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - COMMANDS))
def test_library_leaves_the_process_alone(name):
    """No assert, print, logging, environment variable or flag."""
    for node in ast.walk(_library_tree(name)):
        where = f"tf_adascale/{name}.py:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), (
            f"{where}: raise an error instead; python -O removes an assert."
        )
        assert not FORBIDDEN_NAMES.match(_dotted(node) or ""), (
            f"{where}: the library does not use {_dotted(node)}."
        )
    modules = {m.split(".")[0] for m in _imported(_library_tree(name))}
    assert not modules & {"absl", "logging"}


@pytest.mark.parametrize("name", LIBRARY)
def test_errors_say_what_was_received(name):
    for node in ast.walk(_library_tree(name)):
        if not isinstance(node, ast.Raise) or not isinstance(
            node.exc, ast.Call
        ):
            continue
        if _dotted(node.exc.func) != "ValueError":
            continue
        texts = [
            part.value
            for argument in node.exc.args
            for part in ast.walk(argument)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        message = "".join(texts)
        missing = {"Expected", "Received: "} - set(
            re.findall("Expected|Received: ", message)
        )
        assert not missing, (
            f"tf_adascale/{name}.py:{node.lineno}: a ValueError says what "
            'happened, what was expected, and "Received: name=value".'
        )


# The public surface.


def test_public_names():
    assert set(tf_adascale.__all__) == PUBLIC_NAMES | {"__version__"}
    for name in PUBLIC_NAMES:
        assert hasattr(tf_adascale, name), name


def test_version_is_a_release_in_the_changelog():
    version = tf_adascale.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def _public_objects():
    """Returns the public classes and functions by their dotted names."""
    objects = {}
    for name in PUBLIC_NAMES:
        value = getattr(tf_adascale, name, None)
        if not inspect.ismodule(value):
            objects[name] = value
            continue
        for member, inner in vars(value).items():
            if member.startswith("_") or not callable(inner):
                continue
            if getattr(inner, "__module__", None) == value.__name__:
                objects[f"{name}.{member}"] = inner
    return objects


@pytest.mark.parametrize("name", sorted(_public_objects()))
def test_public_objects_have_an_example(name):
    value = _public_objects()[name]
    # A NamedTuple is a record: the functions that return it show it.
    if inspect.isclass(value) and issubclass(value, tuple):
        assert value.__doc__
        return
    assert ">>> " in (value.__doc__ or ""), (
        f"tf_adascale.{name} needs a docstring with an example."
    )


def _registered():
    """Returns the names of our classes that Keras can deserialize."""
    for name in LIBRARY:
        if not name.endswith("__"):
            importlib.import_module(f"tf_adascale.{name}")
    package = "tf_adascale>"
    return {
        name.removeprefix(package)
        for name in keras.saving.get_custom_objects()
        if name.startswith(package)
    }


def test_registered_classes_are_in_the_table():
    assert _registered() == set(SERIALIZABLE), (
        "Give each class that is registered with Keras a row in SERIALIZABLE."
    )


def _through_json(config):
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("name", sorted(SERIALIZABLE))
def test_config_round_trip(name):
    original = SERIALIZABLE[name]()
    config = _through_json(keras.saving.serialize_keras_object(original))
    # A copy, for Keras takes apart what it reads.
    restored = keras.saving.deserialize_keras_object(_through_json(config))
    again = _through_json(keras.saving.serialize_keras_object(restored))
    assert type(restored) is type(original)
    assert again == config


@pytest.mark.parametrize("name", sorted(SERIALIZABLE))
def test_config_has_the_arguments(name):
    """Each keyword-only argument of a constructor is in its configuration."""
    original = SERIALIZABLE[name]()
    parameters = inspect.signature(type(original).__init__).parameters.values()
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert named <= set(original.get_config())


def test_import_does_not_initialise_devices():
    """Importing leaves the user's choice of devices open."""
    code = (
        "import tensorflow as tf, tf_adascale;"
        "cpu = tf.config.list_physical_devices('CPU')[0];"
        "two = [tf.config.LogicalDeviceConfiguration()] * 2;"
        "tf.config.set_logical_device_configuration(cpu, two);"
        "print(len(tf.config.list_logical_devices('CPU')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "2", done.stderr

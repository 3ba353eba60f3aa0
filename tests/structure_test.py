"""Checks tf_adascale against the layers in CONTRIBUTING.md."""

import ast
import re
import sys

import pytest

from tests import sources

# Packages that the library may import. matplotlib is imported inside functions
# only, which say how to install it.
REQUIREMENTS = {"keras", "numpy", "tensorflow", "matplotlib"}

MAX_LINES = 425
MAX_FUNCTION_LINES = 60

# Methods of named tuples, which are public in spite of their names.
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}


def _layers():
    """Returns the folders of tf_adascale from top to bottom.

    They are the first words, such as `ops/`, of lines in the section "Layers".
    """
    section = re.search(
        r"^## Layers$(.+?)^## ", sources.text("CONTRIBUTING.md"), re.S | re.M
    )
    folders = re.findall(r"^[\s|*-]+`?(\w+)/`?(?=\s|$)", section[1], re.M)
    below = [name for name in folders if name != "tf_adascale"]
    return ["tf_adascale", *(f"tf_adascale/{name}" for name in below)]


LAYERS = _layers()


def test_every_folder_has_its_layer():
    folders = {sources.package(path) for path in sources.LIBRARY}
    assert sorted(LAYERS) == sorted(folders), (
        'CONTRIBUTING.md, section "Layers", lists each folder once.'
    )


@pytest.mark.parametrize("path", sources.LIBRARY)
def test_imports_point_down(path):
    below = LAYERS[LAYERS.index(sources.package(path)) :]
    for file in sources.imported_files(path):
        assert sources.package(file) in below, (
            f"{path} imports {file}. A folder imports only from folders below "
            f"it, which are {below}."
        )
    others = {
        name.split(".")[0]
        for name in sources.imported(path)
        if not sources.file_of(name)
    }
    assert others <= REQUIREMENTS | sys.stdlib_module_names


def _annotations(path):
    """Returns the nodes of a file that are in annotations."""
    nodes = set()
    for node in ast.walk(sources.tree(path)):
        for field in ("annotation", "returns"):
            if (annotation := getattr(node, field, None)) is not None:
                nodes |= set(ast.walk(annotation))
    return nodes


@pytest.mark.parametrize(
    "path", [p for p in sources.LIBRARY if "/distribute/" not in p]
)
def test_only_distribute_knows_distribution(path):
    nodes = set(ast.walk(sources.tree(path))) - _annotations(path)
    used = {
        dotted
        for node in nodes
        if (dotted := sources.dotted(node))
        and dotted.startswith(("tf.distribute", "tf.__internal__"))
    } | {n for n in sources.imported(path) if n.startswith("tensorflow.")}
    assert not used, f"{path} uses {sorted(used)}: that belongs in distribute/."


def _defined_names(path):
    """Returns the names that a file defines, or assigns to its objects."""
    names = set()
    for node in ast.walk(sources.tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (dotted := sources.dotted(node)) and isinstance(
            node.ctx, ast.Store
        ):
            names.add(dotted.removeprefix("self."))
    return names


OURS = NAMED_TUPLE.union(
    *map(_defined_names, sources.LIBRARY),
    *(p.rpartition("/")[2].split(".") for p in sources.LIBRARY),
)


def _private_names_of_others(path):
    """Returns the private names that a file uses and tf_adascale lacks."""
    names = set()
    for node in ast.walk(sources.tree(path)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call):  # getattr(tensor, "_keras_mask")
            constants = (getattr(part, "value", None) for part in node.args)
            names |= {value for value in constants if isinstance(value, str)}
    private = {name for name in names - OURS if re.match(r"_[a-z]\w*$", name)}
    return private | {
        name.rpartition(".")[2]
        for name in sources.imported(path)
        if name.startswith("keras.src.")
    }


@pytest.mark.parametrize("path", sources.LIBRARY)
def test_private_names_of_keras_are_in_the_docstring(path):
    described = ast.get_docstring(sources.tree(path)) or ""
    used = {
        name
        for name in _private_names_of_others(path)
        if not re.search(rf"\b{name}\b", described)
    }
    assert not used, (
        f"{path} uses {sorted(used)}, which Keras does not document. Name them "
        "in its docstring, with the versions they were checked on."
    )


@pytest.mark.parametrize("path", sources.LIBRARY)
def test_every_module_has_its_test(path):
    folder, _, name = path.removesuffix(".py").rpartition("/")
    test = f"tests{folder.removeprefix('tf_adascale')}/{name}_test.py"
    # The changelog's test covers version.py.
    if not name.startswith("_") and name != "version":
        assert (sources.ROOT / test).is_file(), f"{path} needs a {test}."


@pytest.mark.parametrize("path", sources.LIBRARY)
def test_modules_and_functions_are_short(path):
    lines = len(sources.text(path).splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines."
    for node in ast.walk(sources.tree(path)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            lines = node.end_lineno - node.lineno - len(docstring.splitlines())
            assert lines < MAX_FUNCTION_LINES, (
                f"{path}: {node.name} has {lines} lines besides its docstring."
            )

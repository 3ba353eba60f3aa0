"""Checks BUILD against the files and their imports."""

import ast
import collections
import graphlib
import json
import re

import pytest

from tests import sources

MAX_LINES = 200
RULES = ("py_binary", "py_library", "py_test")
MODULE = re.compile(r"(tf_adascale|examples|benchmarks|tests)(\.\w+)+")

# Tests of the whole repository, which import every module by its path.
OF_EVERYTHING = "tests_test"


def _glob(patterns, exclude=(), allow_empty=False):
    del allow_empty

    def matches(pattern):
        paths = sources.ROOT.glob(pattern)
        return {path.relative_to(sources.ROOT).as_posix() for path in paths}

    if patterns == ["**"]:
        return []  # No sources; a walk would enter virtual environments.
    excluded = set().union(*map(matches, exclude))
    return sorted(set().union(*map(matches, patterns)) - excluded)


def _targets():
    """Returns BUILD's Python targets by name, each with its rule."""
    targets = {}

    def rule_of(rule):
        def declare(name, srcs, deps, **_):
            assert name not in targets, f"BUILD has {name} twice."
            deps = [dep.removeprefix(":") for dep in deps]
            targets[name] = {"rule": rule, "srcs": srcs, "deps": deps}

        return declare

    def ignore(*_, **__):
        pass

    names = {rule: rule_of(rule) for rule in RULES}
    names |= dict.fromkeys(("filegroup", "load", "package"), ignore)
    names["glob"] = _glob
    exec(sources.text("BUILD"), names)  # Starlark's subset of Python.
    return targets


TARGETS = _targets()
TARGET_OF = {
    file: name for name, target in TARGETS.items() for file in target["srcs"]
}


def _used_files(path):
    """Returns the files that a file imports, or runs by module name."""
    named = {
        file
        for node in ast.walk(sources.tree(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and MODULE.fullmatch(node.value)
        and (file := sources.file_of(node.value))
    }
    # pytest imports the conftest.py of the folder and of its parents.
    conftests = {
        f"{folder}/conftest.py"
        for folder in (sources.package(path), "tests")
        if path.endswith("_test.py")
    }
    return sources.imported_files(path) | named | conftests


def _expected_deps(name):
    if name == OF_EVERYTHING:
        return sorted(
            name for name in TARGETS if TARGETS[name]["rule"] != "py_test"
        )
    used = set().union(*map(_used_files, TARGETS[name]["srcs"]))
    return sorted({TARGET_OF[file] for file in used & set(TARGET_OF)} - {name})


def test_every_file_is_in_one_target():
    declared = collections.Counter(
        file for target in TARGETS.values() for file in target["srcs"]
    )
    files = [f for folder in sources.FOLDERS for f in sources.files(folder)]
    missing = sorted({sources.package(f) for f in set(files) - set(declared)})
    assert not missing, f"Give {missing} entries in BUILD."
    assert declared == collections.Counter(files)


@pytest.mark.parametrize("name", TARGETS)
def test_target_depends_on_what_its_files_import(name):
    deps = _expected_deps(name)
    entry = json.dumps({name.removesuffix("_test"): deps})[1:-1]
    assert TARGETS[name]["deps"] == deps, f"BUILD's entry should be\n{entry},"


def test_commands_are_binaries():
    for path, name in TARGET_OF.items():
        is_command = re.search("^if __name__ ==", sources.text(path), re.M)
        is_binary = TARGETS[name]["rule"] == "py_binary"
        assert bool(is_command) == is_binary, f"COMMANDS in BUILD: {path}"


def test_no_target_depends_on_itself():
    graphlib.TopologicalSorter(
        {name: target["deps"] for name, target in TARGETS.items()}
    ).prepare()


def test_is_short():
    assert len(sources.text("BUILD").splitlines()) < MAX_LINES

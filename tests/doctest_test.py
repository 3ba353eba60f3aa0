"""Runs the examples in docstrings. A warning is an error, as in any test."""

import doctest
import importlib
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale

ROOT = pathlib.Path(tf_adascale.__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("tf_adascale", "examples")
    for path in (ROOT / folder).rglob("*.py")
)

# Names that examples use without an import, besides those of their module.
GLOBALS = {"keras": keras, "np": np, "tf": tf, "tf_adascale": tf_adascale}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    report = []
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    for example in doctest.DocTestFinder(exclude_empty=True).find(
        module, extraglobs=GLOBALS
    ):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)

"""Checks the layout of the examples."""

import pytest

from tests import sources

EXAMPLES = sources.files("examples")
TRAINERS = {
    path.split("/")[1] for path in EXAMPLES if path.endswith("/train.py")
}


def _trainer(path):
    """Returns the trainer that a file of the examples belongs to, or None."""
    folder = path.split("/")[1]
    return folder if folder in TRAINERS else None


def _reached(path, seen=frozenset()):
    """Returns all files of the examples that importing a file imports."""
    for file in sources.imported_files(path) - seen:
        if file.startswith("examples/"):
            seen = _reached(file, seen | {file})
    return seen


def test_the_trainers_are_those_of_the_paper_and_the_digits():
    paper = {"cifar10", "imagenet", "speech", "transformer", "yolo"}
    assert {*paper, "digits"} == TRAINERS


@pytest.mark.parametrize("trainer", sorted(TRAINERS))
def test_trainers_import_no_trainer(trainer):
    imported = {
        _trainer(file)
        for path in EXAMPLES
        if _trainer(path) == trainer
        for file in _reached(path)
    }
    assert imported <= {trainer, None}


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.startswith("examples/common/")]
)
def test_shared_code_imports_no_trainer_and_no_study(path):
    for file in _reached(path):
        assert file.startswith("examples/common/"), f"{path} imports {file}."


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in EXAMPLES
        if _trainer(path) and not path.endswith(("/train.py", "/demo.py"))
    ],
)
def test_only_train_imports_the_training_loop(path):
    """Models, data, losses and metrics work without it."""
    assert "examples/common/training.py" not in _reached(path)


@pytest.mark.parametrize("name", ["quickstart", "custom_loop"])
def test_single_files_are_short_and_import_no_example(name):
    path = f"examples/{name}.py"
    assert len(sources.text(path).splitlines()) <= 90
    assert not _reached(path)
    assert "# AdaScale: " in sources.text(path)

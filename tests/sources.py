"""The repository's Python files, parsed, for the tests of its conventions."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("tf_adascale", "tests", "examples", "benchmarks")


def files(folder: str) -> list[str]:
    """Returns a folder's Python files, such as "tf_adascale/ops/ema.py"."""
    paths = (ROOT / folder).rglob("*.py")
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


LIBRARY = files("tf_adascale")


def text(path: str) -> str:
    """Returns the text of a file."""
    return (ROOT / path).read_text("utf-8")


@functools.cache
def tree(path: str) -> ast.Module:
    """Returns a file's syntax tree, which callers must not change."""
    return ast.parse(text(path), path)


def package(path: str) -> str:
    """Returns the folder of a file: "tf_adascale/ops"."""
    return path.rpartition("/")[0]


def dotted(node: ast.AST) -> str | None:
    """Returns "tf.distribute.Strategy" for that expression, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return value and f"{value}.{node.attr}"
    return None


def imported(path: str) -> set[str]:
    """Returns the dotted names of the modules and members a file imports."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> str | None:
    """Returns the file that an import of a dotted name reads, if it is ours."""
    # The last part may be a module, or something inside one.
    for module in (name, name.rpartition(".")[0]):
        path = module.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if module and (ROOT / file).is_file():
                return file
    return None


def imported_files(path: str) -> set[str]:
    """Returns the files of the repository that a file imports."""
    return {file for name in imported(path) if (file := file_of(name))} - {path}

"""Tests README.md and the other pages: their examples, commands and links."""

import functools
import itertools
import operator
import re
import runpy

import pytest
import setuptools

import tf_adascale
from tests import harness, sources
from tf_adascale import forecast

DOCS = sorted(
    path.relative_to(sources.ROOT).as_posix()
    for path in sources.ROOT.glob("docs/*.md")
)
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/README.md",
    "examples/cluster/README.md",
    *DOCS,
]
MAX_README_LINES = 150

# Replacements that make the examples short and independent of devices.
SHORTER = {
    "tf.distribute.MirroredStrategy()": "strategy_of(2)",
    "BASE_STEPS = 1500": "BASE_STEPS = 6",
    "MICROBATCHES = 16 ": "MICROBATCHES = 2 ",
    "epochs=30": "epochs=30, verbose=0",
}


def _code(page):
    return re.findall(r"^```python\n(.*?)^```", sources.text(page), re.S | re.M)


def _run(page, changes=()):
    """Runs a page's examples in order; returns the names that they define."""
    names = {"strategy_of": harness.strategy_of}
    for code in _code(page):
        for old, new in {**SHORTER, **dict(changes)}.items():
            code = code.replace(old, new)
        exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    """Examples write files by relative names."""
    monkeypatch.chdir(tmp_path)


def test_the_example_stops_by_progress():
    optimizer = _run("README.md")["model"].optimizer
    # 2 replicas of 2 micro-batches: tau grows by 1 to 4 per step, and the
    # callback checks it after each step.
    assert optimizer.scale == 4
    tau = float(optimizer.scale_invariant_step)
    assert 6 <= tau < 6 + float(optimizer.gain)
    assert harness.first(optimizer.iterations) < 6


def test_the_recorded_run_is_forecast_from():
    names = _run("docs/forecast.md", {"TOTAL_STEPS = 40": "TOTAL_STEPS = 20"})
    optimizer = names["optimizer"]
    assert optimizer.smoothing == 1 - 16 / 1000
    steps = forecast.iterations(names["record"], 4)
    # The gains are float32.
    assert abs(steps - harness.first(optimizer.iterations)) < 1e-4


def test_the_run_resumes_in_the_next_process():
    page, step = "docs/workers_and_failures.md", 0
    for total_steps in (8, 16):
        stop = f"StopAtScaleInvariantStep({total_steps})"
        names = _run(page, {"StopAtScaleInvariantStep(20)": stop})
        optimizer, checkpoint = names["optimizer"], names["checkpoint"]
        tau = float(optimizer.scale_invariant_step)
        assert total_steps <= tau < total_steps + 2
        assert checkpoint.step > step
        step = checkpoint.step
        assert harness.first(optimizer.iterations) == step


@pytest.mark.parametrize("page", [page for page in DOCS if _code(page)])
def test_examples_run(page):
    if page not in ("docs/forecast.md", "docs/workers_and_failures.md"):
        _run(page)


def test_readme_is_short():
    lines = sources.text("README.md").splitlines()
    assert len(lines) <= MAX_README_LINES


def _anchors(text):
    """Returns the anchors that a code host makes of a page's titles."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in kept}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = sources.text(page)
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    for link in filter(None, itertools.chain(*links)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (sources.ROOT / page).parent / path if path else None
        assert target is None or target.exists(), f"{page}: {link}"
        if anchor:
            linked = text if target is None else target.read_text("utf-8")
            assert anchor in _anchors(linked), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_names_of_modules_and_commands_exist(page):
    text = sources.text(page)
    targets = re.findall(r"^([a-z-]+):", sources.text("Makefile"), re.M)
    targets += ["test-oldest", "test-newest"]
    for words in re.findall(r"(?:`|^ *|\$ )make ([a-z -]+)", text, re.M):
        for target in words.split("  ")[0].split():
            assert target in targets, f"{page}: make {target}"
    for name in set(re.findall(r"\b(?:examples|benchmarks)(?:\.\w+)+", text)):
        assert sources.file_of(name), f"{page}: {name}"
    for name in set(re.findall(r"\bpython ((?:\w+/)+\w+\.py)", text)):
        assert (sources.ROOT / name).is_file(), f"{page}: {name}"
    for name in set(re.findall(r"(?<![\w/])tf_adascale((?:\.\w+)+)", text)):
        if name.endswith(".egg"):
            continue
        operator.attrgetter(name[1:])(tf_adascale)


@functools.cache
def _metadata():
    """Returns the arguments that setup.py passes to setuptools."""
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", told.update)
        patch.chdir(sources.ROOT)
        runpy.run_path(str(sources.ROOT / "setup.py"))
    return told


def test_an_index_page_has_no_broken_link_or_picture():
    text = _metadata()["long_description"]
    assert text.startswith("# tf_adascale\n")
    assert "```python\n" in text
    assert not re.search(r"\]\((?!https://)|<img", text)


def test_every_package_is_installed():
    folders = {sources.package(path) for path in sources.LIBRARY}
    expected = {folder.replace("/", ".") for folder in folders}
    assert set(_metadata()["packages"]) == expected

"""Runs in a sequence of processes: each is stopped and resumed."""

import csv
import subprocess
import sys

import pytest

from examples.common import runs
from examples.studies import digits_elastic

# Replaces the trainer: counts to the end and stops at SIGTERM.
TRAINER = """
import csv, json, pathlib, signal, sys, time
flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[2:])
folder = pathlib.Path(flags["model_dir"])
folder.mkdir(exist_ok=True)
log = folder / "log.csv"
rows = list(csv.DictReader(log.open())) if log.exists() else []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
columns = ("epoch", "step", "base_batches", "scale", "scale_invariant_step",
           "gain", "loss")
with log.open("a") as file:
    if not rows:
        print(*columns, sep=",", file=file, flush=True)
    tau = float(rows[-1]["scale_invariant_step"]) if rows else 0.0
    while tau < int(flags["total_steps"]):
        tau += 1
        row = int(tau), tau, tau, flags["scale"], tau, 1, 1 / tau
        print(*row, sep=",", file=file, flush=True)
        time.sleep(0.02)
result = {"algorithm": flags["algorithm"], "scale": flags["scale"],
          "iterations": int(tau), "examples": 1, "metric": "accuracy",
          "value": 1, "mean_gain": 1}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Replaces the trainer of every phase by a script."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    phases = {
        scale: digits_elastic.Phase((str(script),), ())
        for scale in digits_elastic.PHASES
    }
    monkeypatch.setattr(digits_elastic, "PHASES", phases)
    return script


def scales(run):
    return [int(scale) for scale in run.log["scale"]]


def test_each_scale_trains_its_part(tmp_path, trainer):
    run = digits_elastic.train(
        tmp_path / "run", (4, 8, 16), "--algorithm=adascale", total_steps=90
    )
    assert run.log["scale_invariant_step"] == list(range(1, 91))
    assert scales(run) == sorted(scales(run))
    # The study looks at the log 10 times per second, and the trainer takes 50
    # steps per second.
    for scale, until in ((4, 30), (8, 60)):
        last = max(
            tau
            for tau, at in zip(run.log["scale_invariant_step"], scales(run))
            if at == scale
        )
        assert until <= last < until + 25
    assert run.result["iterations"] == 90


def test_parts_that_are_done_are_not_repeated(tmp_path, trainer):
    arguments = (tmp_path / "run", (16, 4), "--algorithm=adascale")
    first = digits_elastic.train(*arguments, total_steps=20)
    assert digits_elastic.train(*arguments, total_steps=20) == first


def test_a_failing_process_is_an_error(tmp_path, trainer):
    trainer.write_text("import sys; sys.exit(3)")
    with pytest.raises(subprocess.CalledProcessError) as error:
        digits_elastic.train(tmp_path / "run", (4, 8), total_steps=20)
    assert error.value.returncode == 3


def test_a_process_that_ends_early_is_an_error(tmp_path, trainer):
    trainer.write_text("")
    with pytest.raises(subprocess.CalledProcessError):
        digits_elastic.train(tmp_path / "run", (4, 8), total_steps=20)


def test_an_incomplete_row_is_ignored(tmp_path):
    log = tmp_path / "log.csv"
    with open(log, "w") as file:
        csv.writer(file).writerows([("epoch", "scale_invariant_step"), (0, 5)])
        file.write("1")
    assert digits_elastic._progress(tmp_path) == 5


def test_both_directions_and_the_figure(tmp_path, trainer, monkeypatch, capsys):
    def plain(benchmark, model_dir, *flags):
        words = [str(trainer), benchmark, *flags, f"--model_dir={model_dir}"]
        subprocess.run([sys.executable, *words], check=True)
        return runs.read(model_dir)

    monkeypatch.setattr(runs, "train", plain)
    results = digits_elastic.main([f"--out={tmp_path}", "--total_steps=30"])
    assert scales(results["up"])[0] == scales(results["down"])[-1] == 4
    assert scales(results["up"])[-1] == scales(results["down"])[0] == 16
    assert runs.table(list(results.values())) in capsys.readouterr().out
    assert (tmp_path / "elastic.png").read_bytes()[:4] == b"\x89PNG"

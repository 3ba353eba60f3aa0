"""The study of forecasts, on made-up runs."""

import numpy as np
import pytest

from examples.common import runs
from examples.studies import forecast


def record(variance):
    """Returns the log of 90 steps with a constant variance and a norm of 1."""
    return {
        "scale_invariant_step": np.linspace(10, 90, 9),
        "gradient_variance": np.full(9, float(variance)),
        "gradient_sqnorm": np.ones(9),
    }


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; returns the list of runs that were asked for."""
    asked = []

    def train(benchmark, model_dir, *arguments):
        asked.append((benchmark, *arguments))
        flags = dict(flag.removeprefix("--").split("=") for flag in arguments)
        scale = int(flags["scale"])
        log = record(1)
        # Five more than T(S) = 90 (S + 1) / (2 S).
        steps = round(45 * (scale + 1) / scale) + 5
        return runs.Run({"iterations": steps}, log)

    monkeypatch.setattr(runs, "train", train)
    return asked


def test_forecasts_and_compares(tmp_path, trained, capsys):
    rows = forecast.main([f"--out={tmp_path}", "--seeds=0,1"])
    assert [row[:3] for row in rows] == [
        (benchmark, scale, seed)
        for benchmark in ("digits", "transformer")
        for seed in (0, 1)
        for scale in (8, 16, 32)
    ]
    # The forecast is 45 * 9/8 = 50.625, the run takes 51 + 5.
    assert rows[0].forecast == pytest.approx(50.625, rel=1e-9)
    assert rows[0].iterations == 56
    assert rows[0].error == pytest.approx(50.625 / 56 - 1, rel=1e-9)
    assert forecast.table(rows) in capsys.readouterr().out
    # The smoothing of S = sqrt(8 * 32) = 16.
    recorded = ("digits", "--algorithm=adascale", "--scale=4", "--seed=1")
    assert (*recorded, "--smoothing=0.984") in trained
    assert len(trained) == 2 * 2 * 4


def test_resumes(tmp_path, trained, monkeypatch):
    done = tmp_path / "digits" / "S4-seed0-smoothing=0.984"
    done.mkdir(parents=True)
    (done / "result.json").touch()
    run = runs.Run({"iterations": 56}, record(9))
    monkeypatch.setattr(runs, "read", lambda path: {str(done): run}[str(path)])
    rows = forecast.main(["digits", f"--out={tmp_path}", "--scales=16"])
    assert [asked[2] for asked in trained] == ["--scale=16"]
    # 90 (9/16 + 1) / (9 + 1), from the run that was read.
    assert rows[0].forecast == pytest.approx(14.0625, rel=1e-9)


def test_unknown_benchmarks_are_refused(trained, capsys):
    with pytest.raises(SystemExit):
        forecast.main(["cifar11"])
    assert "no such benchmark: cifar11" in capsys.readouterr().err
    assert not trained

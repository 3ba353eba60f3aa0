"""A short soak test, and its arithmetic on known series."""

import numpy as np
import pytest

from benchmarks import soak
from tests.processes import children


def rows_of(num_steps, **columns):
    """Returns rows like a `Recorder` writes, with columns replaced."""
    rows = np.zeros(num_steps, [(name, float) for name in soak.COLUMNS])
    rows["step"] = np.arange(1, num_steps + 1)
    rows["clock"] = rows["processor"] = 0.002
    rows["gain"] = 1.5
    rows["tau"] = 1.5 * rows["step"]
    rows["resident"] = np.where(rows["step"] % 100 == 0, 5e8, np.nan)
    for name, values in columns.items():
        rows[name] = values
    return rows


def growing(num_steps, bytes_per_step):
    rows = rows_of(num_steps)
    rows["resident"] += bytes_per_step * rows["step"]
    return rows


def test_slope_and_its_standard_error():
    # About the means 1.5 and 3: (3 + 0 + 0 + 3) / 5 = 1.2. The residuals -0.2,
    # 0.6, -0.6, 0.2 have the variance 0.8 / (4 - 2): sqrt(0.4 / 5).
    found, error = soak.slope(np.arange(4.0), np.array([1.0, 3.0, 3.0, 5.0]))
    assert found == pytest.approx(1.2, rel=1e-12)
    assert error == pytest.approx(0.08**0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "first", "last"),
    [
        # The first hundred are warm-up.
        (20_000, (101, 1100), (19_001, 20_000)),
        (2100, (101, 1100), (1101, 2100)),
        # A short run compares the two halves of the rest.
        (1000, (101, 550), (551, 1000)),
    ],
)
def test_windows(num_steps, first, last):
    steps = [part["step"] for part in soak.windows(rows_of(num_steps))]
    assert [(part[0], part[-1]) for part in steps] == [first, last]
    assert len(steps[0]) == len(steps[1])


@pytest.mark.parametrize(
    ("slowdown", "holds"), [(1.04, True), (1.06, False), (0.94, True)]
)
def test_step_time_compares_medians(slowdown, holds):
    rows = rows_of(4000)
    rows["clock"][3000:] *= slowdown
    # Delaying every third step moves the mean, not the median.
    rows["clock"][3000::3] *= 10
    finding = soak.step_time(rows)
    assert finding.holds == holds
    assert f"median {slowdown:.3f} (standard error 0.000);" in finding.text
    # Of the last 1000 steps, 334 take ten times as long and 666 do not.
    mean = slowdown * (334 * 10 + 666) / 1000
    assert f"mean {mean:.3f}, the processor's 1.000" in finding.text


@pytest.mark.parametrize(("drift", "holds"), [(0.16, True), (0.18, False)])
def test_step_time_allows_for_twice_its_standard_error(drift, holds):
    # Thousands at 2 and 2.08 ms in turn: 0.08 / 2.0356 / 0.6745 is 0.0583.
    rows = rows_of(9000)
    for begin in range(1000, 8000, 2000):
        rows["clock"][begin : begin + 1000] *= 1.04
    assert soak.ratio_error(rows) == pytest.approx(0.0583, abs=1e-4)
    rows["clock"][8000:] *= 1 + drift
    assert soak.step_time(rows).holds == holds


def test_a_steady_drift_is_no_noise():
    rows = rows_of(20_000)
    rows["clock"] *= 1 + 0.1 * rows["step"] / 20_000
    # 0.5 % from a thousand to the next, 9.5 % in all.
    assert not soak.step_time(rows).holds


@pytest.mark.parametrize(
    ("growth", "bare", "holds"),
    [
        # The limit is the bare collectives' growth, a tenth of it, and 100.
        (110, 10, True),
        (112, 10, False),
        (3399, 3000, True),
        (3401, 3000, False),
    ],
)
def test_memory_may_grow_by_what_the_bare_collectives_keep(growth, bare, holds):
    # The first half does not count.
    rows = growing(4000, growth)
    rows["resident"][:2000] += 1e8
    finding = soak.memory(rows, growing(2000, bare))
    assert finding.holds == holds
    assert f"{growth:+.1f} bytes a step" in finding.text
    assert f"{bare:+.1f} (" in finding.text


@pytest.mark.parametrize("noisy", [0, 1])
def test_memory_allows_for_twice_either_standard_error(noisy):
    rows = [growing(4000, 0), growing(2000, 0)]
    pages = np.random.default_rng(0).integers(1000, size=len(rows[noisy]))
    rows[noisy]["resident"] += 4096 * pages
    (found, error), (bare, bare_error) = map(soak.growth, rows)
    # One of the errors is nearly zero.
    allowed = 100 + 2 * (error + bare_error) + abs(bare) / 10
    assert error + bare_error > 50
    step = rows[0]["step"]
    for excess, holds in ((-1, True), (1, False)):
        rows[0]["resident"] += (allowed + excess - found + bare) * step
        assert soak.memory(*rows).holds == holds
        rows[0]["resident"] -= (allowed + excess - found + bare) * step


def test_tau_is_the_sum_to_the_bit():
    gains = np.random.default_rng(0).uniform(1, 4, 5000).astype("float32")
    # Multiples of 2^-23 below 2^14, which float64 adds without rounding.
    total = np.cumsum(gains.astype("float64"))
    exact = rows_of(5000, gain=gains, tau=total)
    assert soak.tau(exact).holds
    rounded = rows_of(5000, gain=gains, tau=np.cumsum(gains))  # float32
    assert not soak.tau(rounded).holds
    exact["tau"][-1] += 2.0**-23
    assert not soak.tau(exact).holds


def test_table_has_a_line_per_thousand():
    rows = rows_of(2500)
    rows["clock"][1000:2000:2] = 0.006  # Half of them: median and mean 4 ms.
    rows["processor"][1000:2000] = 0.003
    rows["gain"][2000:] = 2
    rows["resident"][1000:2000] *= 2
    lines = [line.split() for line in soak.table(rows)[1:]]
    assert lines == [
        ["1000", "2.00", "2.00", "2.00", "1.500", f"{5e8 / 2**20:.1f}"],
        ["2000", "4.00", "4.00", "3.00", "1.500", f"{1e9 / 2**20:.1f}"],
        ["2500", "2.00", "2.00", "2.00", "2.000", f"{5e8 / 2**20:.1f}"],
    ]


def test_recorder_writes_what_fit_logs(tmp_path):
    recorder = soak.Recorder(str(tmp_path / "steps.csv"))
    recorder.on_train_begin()
    for step in range(1, 201):
        logs = {"gain": 1.25, "scale_invariant_step": 1.25 * step}
        recorder.on_train_batch_end(0, logs)
    recorder.on_train_end()
    rows = np.genfromtxt(tmp_path / "steps.csv", delimiter=",", names=True)
    assert rows.dtype.names == soak.COLUMNS
    assert rows["step"].tolist() == list(range(1, 201))
    assert set(rows["gain"]) == {1.25}
    assert rows["tau"].tolist() == np.cumsum(rows["gain"]).tolist()
    assert np.flatnonzero(np.isfinite(rows["resident"])).tolist() == [99, 199]
    # TensorFlow alone takes more than 100 MiB.
    assert np.nanmin(rows["resident"]) > 100 * 2**20
    for name in ("clock", "processor"):
        assert np.all(rows[name] >= 0)
        assert rows[name].sum() > 0


@pytest.mark.multiworker
def test_two_workers(tmp_path, monkeypatch, capsys):
    def launched(command, *, workers):
        assert workers == 2
        with children.cluster(*command) as processes:
            for child in processes:
                assert child.finish() == 0, child.errors()
        return 0

    assert soak.make_model(1).jit_compile
    monkeypatch.setattr(soak.launch, "launch", launched)
    code = soak.main(["--steps=1000", f"--out={tmp_path}"])
    output = capsys.readouterr().out
    # On a busy machine so few steps may exceed the limits of time and memory.
    assert code == ("FAILS" in output)
    assert output.count("\nworker ") == 2
    assert output.count("the sum of 1000 gains: 0.0") == 2
    first, second = (
        np.genfromtxt(
            tmp_path / f"steps-{index}.csv", delimiter=",", names=True
        )
        for index in range(2)
    )
    assert first["gain"].tolist() == second["gain"].tolist()
    # Four samples: two workers of two micro-batches.
    assert 2 < first["gain"].max() <= 4
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_a_worker_that_fails_gives_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(soak.launch, "launch", lambda command, workers: 9)
    assert soak.main([f"--out={tmp_path}"]) == 9


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "--steps must be a multiple of 1000"),
        ("--steps=1500", "--steps must be a multiple of 1000"),
        ("--workers=0", "--workers must be 1 or more"),
    ],
)
def test_usage(flag, message, capsys):
    with pytest.raises(SystemExit):
        soak.main([flag])
    assert message in capsys.readouterr().err

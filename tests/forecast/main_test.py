"""The command `python -m tf_adascale.forecast`."""

import pathlib
import subprocess
import sys

import pytest

from tests import harness
from tf_adascale import forecast
from tf_adascale.forecast import __main__ as command

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path):
    """A log with as much signal as noise: T(S) = 90 (S + 1) / (2 S)."""
    path = tmp_path / "run.csv"
    path.write_text(
        "gradient_sqnorm,gradient_variance,scale_invariant_step\n"
        "1,1,40\n1,1,90\n"
    )
    return path


@pytest.mark.parametrize(
    "text, expected",
    [
        ("4", [4]),
        ("0.5, 3,1e3", [0.5, 3, 1000]),
        ("1,2,4,...,1024", [2**k for k in range(11)]),
        ("1,2,...,1024", [2**k for k in range(11)]),
        ("8,4,...,0.5", [8, 4, 2, 1, 0.5]),
        ("10,20,...,50", [10, 20, 30, 40, 50]),
        ("2,4,6,...,10", [2, 4, 6, 8, 10]),
        ("1,10,...,100,200,...,400", [1, 10, 100, 200, 400]),
        # Thirds are not exact. The last scale is the one given.
        ("0.1,0.3,...,8.1", [0.1, 0.3, 0.9, 2.7, 8.1]),
    ],
)
def test_scales_may_be_progressions(text, expected):
    result = command.parsed_scales(text)
    assert result == pytest.approx(expected, rel=1e-12)
    assert result[-1] == expected[-1]


@pytest.mark.parametrize(
    "text",
    [
        *("1,2,4,...,1000", "1,...,8", "...,8", "1,2,...", "1,1,...,8"),
        *("1,2,...,2", "1,2,...,-8", "2,4,...,nan", "0,1,...,3"),
        *("1,1.0000001,...,1e6", "1,two", "", "1,,2"),
    ],
)
def test_other_scales_are_refused(text):
    with harness.refused("`scales` must be numbers", f"scales={text!r}"):
        command.parsed_scales(text)


class TestMain:
    def test_prints_the_table(self, log, capsys):
        rows = command.main([f"--log={log}"])
        assert [row.scale for row in rows] == [2.0**k for k in range(11)]
        # 2 / (S + 1) = 1/2 at S = 3.
        assert capsys.readouterr().out == (
            f"{forecast.table(rows)}\n\n"
            "The efficiency falls under 50 % at S = 3.0.\n"
        )
        assert rows[2].iterations == pytest.approx(56.25, rel=1e-9)

    def test_has_options(self, log, tmp_path, capsys):
        rows = command.main(
            [
                f"--log={log}",
                "--scales=4",
                "--total_steps=900",
                "--efficiency=0.25",
                f"--csv={tmp_path / 'out.csv'}",
                f"--picture={tmp_path / 'out.png'}",
            ]
        )
        assert rows[0].iterations == pytest.approx(562.5, rel=1e-9)
        # 2 / (S + 1) = 1/4 at S = 7.
        assert "under 25 % at S = 7.0." in capsys.readouterr().out
        assert (tmp_path / "out.csv").read_text().startswith("scale,iter")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    def test_names_what_is_efficient_at_every_scale(self, log, capsys):
        log.write_text(log.read_text().replace("\n1,", "\n0,"))
        command.main([f"--log={log}"])
        printed = capsys.readouterr().out
        assert "The efficiency is 50 % or more at every scale." in printed

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "required: --log"),
            (["--scales=1,x"], "`scales` must be"),
            (["--scales=0"], "`scale` must be"),
            (["--total_steps=-1"], "`total_steps` must be"),
            (["--efficiency=2"], "`efficiency` must be"),
            (["--log=missing.csv"], "No such file or directory: 'missing.csv'"),
            (["--log=."], "Is a directory: '.'"),
            (["--csv=missing/out.csv"], "No such file or directory"),
        ],
    )
    def test_refuses_bad_arguments(self, arguments, message, log, capsys):
        if arguments and not arguments[0].startswith("--log"):
            arguments = [f"--log={log}", *arguments]
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments)
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error

    @pytest.mark.parametrize(
        "content, message",
        [
            # Longer than Python's CSV reader allows.
            ("x" * 200_000, "field larger than"),
            (
                "gradient_sqnorm,gradient_variance,scale_invariant_step\n1,",
                "run.csv, line 2: fields=",
            ),
        ],
    )
    def test_refuses_bad_logs(self, content, message, log, capsys):
        log.write_text(content)
        with pytest.raises(SystemExit, match="2"):
            command.main([f"--log={log}"])
        assert message in capsys.readouterr().err


def test_a_process_prints_the_table_and_warns_of_nothing(log):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tf_adascale.forecast"),
            *(f"--log={log}", "--scales=1,4"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2] == "4        56.2      1.60      40.0 %"
    # runpy would warn if the package imported the module itself.
    assert "Warning" not in done.stderr

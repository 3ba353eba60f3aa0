"""Reports: the table, the CSV and the picture of a forecast."""

import csv
import sys

import pytest

from tf_adascale import forecast


def row(scale):
    """Returns a row of as much signal as noise: T(S) = 90 (S + 1) / (2 S)."""
    return forecast.Row(
        scale,
        90 * (scale + 1) / (2 * scale),
        2 * scale / (scale + 1),
        2 / (scale + 1),
    )


ROWS = [row(scale) for scale in (1.0, 2.0, 4.0, 1024.0)]


def test_table():
    assert forecast.table(ROWS).splitlines() == [
        "   S  iterations  speed-up  efficiency",
        "   1        90.0      1.00     100.0 %",
        "   2        67.5      1.33      66.7 %",
        "   4        56.2      1.60      40.0 %",
        "1024        45.0      2.00       0.2 %",
    ]


def test_csv_is_read_back(tmp_path):
    path = tmp_path / "forecast.csv"
    forecast.write_csv(ROWS, path)
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == forecast.Row._fields
    assert [tuple(map(float, line)) for line in lines] == ROWS


class TestPicture:
    @pytest.mark.parametrize("number", [1, 50])
    def test_is_a_png(self, tmp_path, number):
        path = tmp_path / "forecast.png"
        forecast.picture([row(1.25**k) for k in range(number)], path)
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        # Big-endian, in the first chunk: 7 by 5 inches at 150 dpi.
        size = [int.from_bytes(content[at : at + 4]) for at in (16, 20)]
        assert size == [1050, 750]
        assert 10_000 < len(content) < 200_000

    def test_does_not_show_the_order_of_the_rows(self, tmp_path):
        for name, rows in (("one", ROWS), ("other", ROWS[::-1])):
            forecast.picture(rows, tmp_path / name)
        one, other = sorted(tmp_path.iterdir())
        assert one.read_bytes() == other.read_bytes()

    def test_needs_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            forecast.picture(ROWS, tmp_path / "forecast.png")
        assert not list(tmp_path.iterdir())

"""The files of a run: rows that are dropped, and atomic writes."""

import os
import resource

import pytest

from examples.common import model_directory

WHOLE = "epoch,loss\r\n0,4.5\r\n1,3.5\r\n2,2.5\r\n"


@pytest.mark.parametrize(
    "log, first_epoch, expected",
    [
        (WHOLE, 3, WHOLE),
        (WHOLE, 2, "epoch,loss\r\n0,4.5\r\n1,3.5\r\n"),
        (WHOLE, 0, ""),
        # The last row is truncated.
        (WHOLE + "3", 3, WHOLE),
        (WHOLE + "3", 4, WHOLE),
        (WHOLE + "3,1.5", 3, WHOLE),
        # A row in the middle is truncated: the disk was full for a while.
        ("epoch,loss\r\n0,4.51,3.5\r\n1,3.5\r\n", 2,
         "epoch,loss\r\n1,3.5\r\n"),
        # The header is truncated. Keras writes a new one.
        ("epoch,lo", 1, ""),
        ("epoch,loss\r\n", 1, ""),
        ("", 1, ""),
    ],
)  # fmt: skip
def test_rows_without_a_checkpoint_are_dropped(
    log, first_epoch, expected, tmp_path
):
    path = tmp_path / "log.csv"
    path.write_bytes(log.encode())
    model_directory.drop_rows(str(path), first_epoch=first_epoch)
    assert path.read_bytes().decode() == expected
    assert os.listdir(tmp_path) == ["log.csv"]


def test_a_missing_log_stays_missing(tmp_path):
    model_directory.drop_rows(str(tmp_path / "log.csv"), first_epoch=0)
    assert not os.listdir(tmp_path)


class TestWrite:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        return path

    def test_replaces_the_whole_file(self, path, tmp_path):
        path.write_text("old and long")
        model_directory.write_text(str(path), "new\r\n")
        assert path.read_bytes() == b"new\r\n"
        assert os.listdir(tmp_path) == ["file"]

    def test_keeps_the_old_file_when_interrupted(self, path, monkeypatch):
        def replace(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(model_directory.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            model_directory.write_text(str(path), "new")
        assert path.read_text() == "old"

    def test_keeps_the_old_file_without_json(self, path):
        with pytest.raises(TypeError, match="JSON"):
            model_directory.write_json(str(path), {"value": object()})
        assert path.read_text() == "old"

    def test_keeps_the_old_file_if_the_disk_is_full(self, path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                model_directory.write_text(str(path), "new and longer")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_text() == "old"

"""Runs as separate processes."""

import os
import subprocess

import pytest

from examples.common import runs


def test_alone_is_another_process():
    assert runs.alone(os.getpid) != os.getpid()


def test_a_failing_process_is_an_error(tmp_path):
    # Exits at once: there is no such trainer.
    with pytest.raises(subprocess.CalledProcessError):
        runs.train("nothing", str(tmp_path))

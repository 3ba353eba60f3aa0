"""Runs as separate processes."""

import json
import os
import subprocess
import sys

import pytest

from examples.common import runs


def test_alone_is_another_process():
    assert runs.alone(os.getpid) != os.getpid()


def test_a_run_is_read_back(tmp_path, monkeypatch, capsys):
    result = {"algorithm": "adascale", "scale": 8}

    def process(command, *, check, env):
        assert check
        assert env["TF_CPP_MIN_LOG_LEVEL"]
        assert command == [
            *(sys.executable, "-m", "examples.digits.train"),
            *(f"--model_dir={tmp_path}", "--scale=8"),
        ]
        (tmp_path / "result.json").write_text(json.dumps(result))
        (tmp_path / "log.csv").write_text(
            "epoch,loss,step,val_loss\n0,2.5,4,\n1,1.5,8,\n"
        )

    monkeypatch.setattr(runs.subprocess, "run", process)
    run = runs.train("digits", str(tmp_path), "--scale=8")
    assert run.result == result
    assert run.log == {"epoch": [0, 1], "loss": [2.5, 1.5], "step": [4, 8]}
    assert run.steps == [4, 8]
    assert run.label == "AdaScale, S = 8"
    command = "$ python -m examples.digits.train --model_dir="
    assert command in capsys.readouterr().out


def test_a_failing_process_is_an_error(tmp_path):
    # Exits at once, because there is no such trainer.
    with pytest.raises(subprocess.CalledProcessError):
        runs.train("nothing", str(tmp_path))

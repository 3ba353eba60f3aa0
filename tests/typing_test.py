"""A type checker accepts a program that uses tf_adascale."""

import pathlib
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parent / "typing" / "user_program.py"

# Lines with type errors, appended to the program.
MISTAKES = """
tf_adascale.AdaScale(adam, scale="big")
tf_adascale.AdaScale(adam, estimator="best")
tf_adascale.AdamScale(adam, smoothing=[0.5])
tf_adascale.Adasum(adam, "updates")
model.compile("sgd", "mse", microbatches="two")
tf_adascale.callbacks.Checkpoint("checkpoints")
tf_adascale.forecast.rows(record, 16)
tf_adascale.forecast.read("log.csv").scales_at
tf_adascale.ops.gain.ratio(moments)
optimizer.gain_at("big")
""".strip()


def test_a_program_is_accepted_but_for_its_mistakes(tmp_path):
    program = PROGRAM.read_text()
    path = tmp_path / "program.py"
    path.write_text(program + MISTAKES)
    # Outside the repository, mypy finds the installed package.
    # Keras and TensorFlow are not annotated.
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports"]
    process = subprocess.run(
        [*command, "--cache-dir", tmp_path / "cache", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = [
        int(line.split(":")[1])
        for line in process.stdout.splitlines()
        if ": error: " in line
    ]
    first = len(program.splitlines()) + 1
    last = first + len(MISTAKES.splitlines())
    assert found == list(range(first, last)), process.stdout + process.stderr

"""quickstart.py and custom_loop.py, as a newcomer runs them."""

import re
import subprocess
import sys

from examples import quickstart
from tests import sources


def test_quickstart(monkeypatch, capfd):
    # A quarter of the steps, with a schedule as much shorter.
    monkeypatch.setattr(quickstart, "BASE_STEPS", 400)
    steps, accuracy = quickstart.main([])
    assert 400 / 16 < steps < 400 / 4  # The gain is about 6.
    assert accuracy > 0.9
    printed = capfd.readouterr().out
    # The rows of `fit`, and the result.
    assert " - gain: " in printed
    assert (
        f"\n{steps} steps of 128 examples did the work of 400 steps of 8. "
        f"Test accuracy: {accuracy:.1%}\n" in printed
    )


def test_custom_loop():
    # In its own process: it divides the CPU in logical devices.
    done = subprocess.run(
        [sys.executable, "examples/custom_loop.py"],
        cwd=sources.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    saved = re.findall(r"^Saved step (\d+): (\d+) base", done.stdout, re.M)
    (half, half_base), (last, last_base) = (map(int, pair) for pair in saved)
    # S = 2 replicas * 4 micro-batches: a step is worth 1 to 8 base steps.
    assert 800 / 8 < half < 800 <= half_base <= 808
    assert half + 800 / 8 <= last < 1600 <= last_base <= 1608
    # The second half starts where the first one ended.
    _, resumed = done.stdout.split("Resuming from the checkpoint")
    first = int(re.search(r"^Step (\d+):", resumed, re.M)[1])
    assert half <= first < half + 20
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)%", done.stdout)[1])
    assert accuracy > 94

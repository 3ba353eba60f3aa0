"""Tests of `import tf_adascale` where something is missing."""

import subprocess
import sys


def test_import_without_tensorflow_says_what_to_install():
    code = "import sys; sys.modules['tensorflow'] = None; import tf_adascale"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith(
        "ImportError: tf_adascale needs one of TensorFlow's builds, which "
        "exclude each other. Install the one for your hardware: pip install "
        '"tf_adascale[cpu]", "tf_adascale[gpu]" or "tf_adascale[tpu]".'
    )

"""Tests of `import tf_adascale`, each in its own process."""

import subprocess
import sys


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )


def test_import_without_tensorflow_says_what_to_install():
    process = run(
        "import sys; sys.modules['tensorflow'] = None; import tf_adascale"
    )
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith(
        "ImportError: tf_adascale needs one of TensorFlow's builds, which "
        "exclude each other. Install the one for your hardware by the extra "
        'cpu, gpu or tpu of this package, in a clone by pip install ".[cpu]".'
    )


def test_another_backend_is_refused_and_warned_of_at_import():
    # Only TensorFlow is installed.
    process = run(
        "import keras; keras.backend.backend = lambda: 'jax';"
        "import tf_adascale;"
        "print('imported', flush=True);"
        "tf_adascale.AdaScale(keras.optimizers.SGD())"
    )
    rule = (
        "`keras.backend.backend()` must be 'tensorflow' for tf_adascale: set "
        "KERAS_BACKEND=tensorflow before Keras is imported. Received: "
        "keras.backend.backend()='jax'"
    )
    assert process.stdout.strip() == "imported"
    assert f"UserWarning: {rule}" in process.stderr
    assert process.stderr.rstrip().endswith(f"ValueError: {rule}")


def test_import_does_not_initialise_devices():
    """The user can still choose devices afterwards."""
    process = run(
        "import tensorflow as tf, tf_adascale;"
        "cpu = tf.config.list_physical_devices('CPU')[0];"
        "two = [tf.config.LogicalDeviceConfiguration()] * 2;"
        "tf.config.set_logical_device_configuration(cpu, two);"
        "print(len(tf.config.list_logical_devices('CPU')))"
    )
    assert process.stdout.strip() == "2", process.stderr

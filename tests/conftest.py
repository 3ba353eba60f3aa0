"""What every test gets: eight logical CPU devices and a fresh Keras.

TensorFlow is imported inside functions: pytest-xdist's controller loads this
file too, but only hands tests to workers, and need not wait for the import.
"""

import os

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "repository",
    # The first example of a property traces its graph: no deadline fits both.
    deadline=None,
    # The same examples on every run, and no database of those that failed.
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("repository")

# A failed assertion there is explained as one in a test is.
pytest.register_assert_rewrite("tests.harness", "tests.processes.children")


def pytest_configure(config):
    """Divides the CPU in logical devices, before TensorFlow initialises."""
    if config.getoption("dist", "no") != "no":
        return  # pytest-xdist's controller.
    # TensorFlow reads these when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf

    from tests import harness

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * harness.NUM_DEVICES
    )
    # There is a worker per core, and several replicas in each.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    _disable_autotuning(tf)


def _disable_autotuning(tf):
    """Makes datasets without the thread that tunes their parallelism.

    When an iterator is deleted, TensorFlow wakes this thread and waits until it
    ends. If the thread goes back to sleep just before it is told to end, the
    wait takes as long as its pause, up to a minute. On a busy machine this
    happens to some iterators in a hundred.
    """

    def untuned(dataset):
        options = tf.data.Options()
        options.autotune.enabled = False
        return dataset.with_options(options)

    # TensorFlow calls this to make an iterator.
    tf.data.Dataset._apply_debug_options = untuned


@pytest.fixture
def strategy_of():
    """A function of a number of replicas that returns such a strategy."""
    from tests import harness

    return harness.strategy_of


@pytest.fixture(autouse=True)
def fresh_keras():
    """Gives each test the names, seeds and settings of a fresh process."""
    import keras

    policy = keras.config.dtype_policy()
    # Collecting garbage takes half a second with TensorFlow loaded.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)

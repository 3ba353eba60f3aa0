"""What every test gets: eight logical CPU devices and a fresh Keras.

TensorFlow is imported inside functions: pytest-xdist's controller loads this
file too, but only hands tests to workers, and need not wait for the import.
"""

import os

import hypothesis
import pytest

NUM_DEVICES = 8

hypothesis.settings.register_profile(
    "repository",
    # The first example of a property traces its graph: no deadline fits both.
    deadline=None,
    # The same examples on every run, and no database of those that failed.
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("repository")


def pytest_configure(config):
    """Divides the CPU in logical devices, before TensorFlow initialises."""
    if config.getoption("dist", "no") != "no":
        return  # pytest-xdist's controller.
    # TensorFlow reads these when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * NUM_DEVICES
    )
    # There is a worker per core, and several replicas in each.
    tf.config.threading.set_intra_op_parallelism_threads(1)


@pytest.fixture
def strategy_of():
    """A function of a number of replicas that returns such a strategy.

    One replica is the default strategy, several are a `MirroredStrategy`.
    """
    return _strategy


def _strategy(num_replicas):
    import tensorflow as tf

    if num_replicas == 1:
        return tf.distribute.get_strategy()
    if not 1 < num_replicas <= NUM_DEVICES:
        raise ValueError(
            "There are not enough logical devices for the strategy. Expected "
            f"1 to {NUM_DEVICES} replicas. "
            f"Received: num_replicas={num_replicas}"
        )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(num_replicas)],
        # The default of CPUs is a collective, whose groups stay: a strategy of
        # another size in the same process would be refused.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


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

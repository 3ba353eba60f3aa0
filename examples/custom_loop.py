"""A custom training loop with replicas, micro-batches, checkpoint and resume.

Paper:    Johnson et al., "AdaScale SGD", ICML 2020
Command:  python examples/custom_loop.py
Hardware: 2 CPU cores, or GPUs
Time:     15 seconds
Metric:   test accuracy: 97 %
"""

import tempfile

import keras
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tf_adascale

BASE_BATCH, BASE_STEPS = 8, 1600  # The schedule below was tuned for these.
MICROBATCHES = 4  # Per replica and step.
cross_entropy = keras.losses.sparse_categorical_crossentropy


def train(strategy, directory, x, y, *, until):
    """Resumes from the last checkpoint and trains until a base step."""
    with strategy.scope():
        hidden = keras.layers.Dense(64, activation="relu")
        logits = keras.layers.Dense(10)
        model = keras.Sequential([keras.Input((64,)), hidden, logits])
        decay = keras.optimizers.schedules.ExponentialDecay
        sgd = keras.optimizers.SGD(decay(0.05, BASE_STEPS, 0.01), momentum=0.9)
        # AdaScale: wraps the optimizer and the schedule of the base batch.
        optimizer = tf_adascale.AdaScale(sgd)
        # AdaScale: each replica takes this many gradient samples per step.
        optimizer.microbatches = MICROBATCHES
        optimizer.build(model.trainable_variables)
    # AdaScale: its state is part of the optimizer's variables.
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    manager = tf.train.CheckpointManager(checkpoint, directory, max_to_keep=2)
    manager.restore_or_initialize()
    step = int(tf.convert_to_tensor(optimizer.iterations))

    def replica_step(*batch):
        variables = model.trainable_variables
        total, sqnorm_sum = [tf.zeros_like(v) for v in variables], 0.0
        parts = [tf.split(tensor, MICROBATCHES) for tensor in batch]
        for images, labels in zip(*parts):
            with tf.GradientTape() as tape:
                losses = cross_entropy(labels, model(images), from_logits=True)
                # The mean, divided by the number of replicas.
                loss = tf.nn.compute_average_loss(losses)
            sample = tape.gradient(loss, variables)
            total = [a + b for a, b in zip(total, sample)]
            # AdaScale: needs the squared norm of each gradient sample ...
            sqnorm_sum += optimizer.sample_sqnorm(sample, variables)
        mean = [gradient / MICROBATCHES for gradient in total]
        # AdaScale: ... and that of their mean, to estimate the gain.
        optimizer.apply(mean, variables, sample_sqnorm_sum=sqnorm_sum)

    train_step = tf.function(lambda batch: strategy.run(replica_step, batch))
    batch_size = BASE_BATCH * MICROBATCHES * strategy.num_replicas_in_sync
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0)
    data = data.repeat().batch(batch_size).skip(step)
    batches = iter(strategy.experimental_distribute_dataset(data))
    # AdaScale: counts base steps, and training ends after `until` of them.
    while (base_steps := float(optimizer.scale_invariant_step)) < until:
        if step % 20 == 0:
            print(f"Step {step}: {base_steps:.0f} of {BASE_STEPS} base steps")
        train_step(next(batches))
        step += 1
    print(f"Saved step {step}: {base_steps:.0f} base steps in {manager.save()}")
    return model


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, logical)
    devices = tf.config.list_logical_devices  # Two CPU devices without GPUs.
    names = [device.name for device in devices("GPU") or devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(names)
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, random_state=0)
    with tempfile.TemporaryDirectory() as directory:
        train(strategy, directory, x, y, until=BASE_STEPS / 2)
        print("Resuming from the checkpoint, as a new process would")
        model = train(strategy, directory, x, y, until=BASE_STEPS)
    accuracy = (model(x_test).numpy().argmax(axis=-1) == y_test).mean()
    print(f"Test accuracy: {accuracy:.1%}")

"""Replicas: counted, summed over and handed off to.

The only module that knows `tf.distribute`. A training step runs once per
replica, in *replica context*. Variables are updated where `hand_off` leads:
cross-replica context under MirroredStrategy, replica context under strategies
that have no `merge_call`. `update` works in both.
"""

import os
import threading

import keras
import tensorflow as tf

# The processes of a cluster that train.
_WORKER_JOBS = ("chief", "worker")

# What their collectives raise when one of them is gone.
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)
_COLLECTIVE = "Collective ops"

# Large enough to fill a network, small enough that few values are copied.
BYTES_PER_PACK = 2**20

# What each replica sends at a time where every replica gets everybody's.
BYTES_PER_GATHER = 2**22


def strategy():
    """Returns the `tf.distribute.Strategy` in effect, the default if none is.

    Example:

    >>> strategy().num_replicas_in_sync
    1
    """
    return tf.distribute.get_strategy()


def in_replica_context():
    """Returns whether the caller runs once per replica.

    Example:

    >>> in_replica_context()
    True
    """
    return tf.distribute.get_replica_context() is not None


def total(values):
    """Returns the sums over the replicas, by one all-reduce of the whole list.

    Args:
        values: list of tensors or `tf.IndexedSlices`, of any types and shapes;
            a replica's own. To be called in replica context.

    Returns:
        List like `values`, the same on every replica.

    Example:

    >>> [float(value) for value in total([tf.constant(2.0)])]
    [2.0]
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return list(values)
    # By default TensorFlow copies all values into one tensor and back. Sorted
    # and packed up to a size, large ones go uncopied and small ones together.
    order = sorted(range(len(values)), key=lambda i: _size(values[i]))[::-1]
    reduced = context.all_reduce(
        tf.distribute.ReduceOp.SUM,
        [values[i] for i in order],
        options=tf.distribute.experimental.CommunicationOptions(
            bytes_per_pack=BYTES_PER_PACK
        ),
    )
    places = {i: place for place, i in enumerate(order)}
    return [reduced[places[i]] for i in range(len(values))]


def index():
    """Returns this replica's place among all, scalar int32.

    Example:

    >>> int(index())
    0
    """
    context = tf.distribute.get_replica_context()
    return tf.convert_to_tensor(context.replica_id_in_sync_group, tf.int32)


def gathered(value):
    """Returns a value of every replica, along a new first axis.

    Args:
        value: tensor of a known shape; a replica's own. To be called in replica
            context.

    Returns:
        Tensor of shape `(N, ...)`, the same on every replica.

    Example:

    >>> gathered(tf.constant([3.0, 4.0])).numpy().tolist()
    [[3.0, 4.0]]
    """
    context = tf.distribute.get_replica_context()
    count = context.num_replicas_in_sync
    if count == 1:
        return value[None]
    # The collectives of CPUs and GPUs do not know the shape.
    return tf.ensure_shape(
        context.all_gather(value[None], axis=0), (count, *value.shape)
    )


def inner_products(values):
    """Returns the inner products between the replicas, of each of several.

        out[v, i, j] = sum over entries, x_i x_j,    x_i: value v of replica i

    The values are gathered in pieces of `BYTES_PER_GATHER`, one after another:
    a replica holds N pieces and their products at a time, however large the
    values are, and receives N - 1 times their size altogether.

    Args:
        values: list of V >= 1 floating tensors of known shapes; a replica's
            own. To be called in replica context.

    Returns:
        Tensor of shape `(V, N, N)`, the same on every replica. float32, or
        float64 where any value is float64.

    Example:

    >>> inner_products([tf.constant([3.0, 4.0])]).numpy().tolist()
    [[[25.0]]]
    """
    wide = any(value.dtype == tf.float64 for value in values)
    dtype = tf.float64 if wide else tf.float32
    count = strategy().num_replicas_in_sync
    rows = [tf.zeros((count,), dtype) for _ in values]  # Row i, on replica i.
    for bucket in _buckets(values, BYTES_PER_GATHER // dtype.size):
        # Not before the last bucket is done: all at once would fill the memory.
        with tf.control_dependencies(rows):
            pieces = [
                tf.cast(tf.reshape(values[v], [-1])[start:end], dtype)
                for v, start, end in bucket
            ]
            own = tf.concat(pieces, 0)
        # Not a matrix product: those round to 10 bits on some accelerators.
        products = gathered(own) * own
        begin = 0
        for v, start, end in bucket:
            length = end - start
            part = products[:, begin : begin + length]
            rows[v] += tf.reduce_sum(part, axis=1)
            begin += length
    # Each row is computed by one replica only, so all have the same numbers.
    mine = tf.one_hot(index(), count, dtype=dtype)
    (result,) = total([mine[:, None] * tf.stack(rows)[:, None, :]])
    return result


def hand_off(function, strategy, *values):
    """Calls `function(strategy, *values)` where variables may be updated.

    A `tf.cond` around updates is allowed inside `function`, but not around the
    call of `hand_off`.

    Args:
        function: callable; called once for all replicas, or once by each.
        strategy: `tf.distribute.Strategy`.
        *values: nested tensors, each replica's own; `function` gets them merged
            and passes them on to `update`.

    Returns:
        What `function` returns.

    Example:

    >>> float(hand_off(lambda strategy, x: x + 1, strategy(), tf.constant(1.0)))
    2.0
    """
    # tf.__internal__ is what Keras's own optimizers use (TF 2.18 to 2.21).
    return tf.__internal__.distribute.interim.maybe_merge_call(
        function, strategy, *values
    )


def update(strategy, variable, function, *values):
    """Calls `function(variable, *values)` on every device's copy of a variable.

    To be called inside the function given to `hand_off`.

    Args:
        strategy: `tf.distribute.Strategy`.
        variable: `keras.Variable` or `tf.Variable`.
        function: callable of a device's `tf.Variable` and a device's values.
        *values: nested tensors as `hand_off` passed them, or variables.

    Example:

    >>> variable = tf.Variable(1.0)
    >>> update(strategy(), variable, lambda v, x: v.assign_add(x), 2.0)
    >>> float(variable)
    3.0
    """
    strategy.extended.update(
        _native(variable),
        function,
        args=tuple(_native(value) for value in values),
        group=False,
    )


def local(strategy, value):
    """Returns this process's first replica's part of a value.

    Example:

    >>> float(local(strategy(), tf.constant(2.0)))
    2.0
    """
    return strategy.experimental_local_results(value)[0]


def mean(strategy, value):
    """Returns the mean over all replicas of a value, in cross-replica context.

    Example:

    >>> float(mean(strategy(), tf.constant(2.0)))
    2.0
    """
    return strategy.reduce("MEAN", value, axis=None)


def run(strategy, function, *values):
    """Calls `function(*values)` once per replica; returns per-replica results.

    Example:

    >>> float(run(strategy(), lambda x: 2 * x, tf.constant(1.0)))
    2.0
    """
    return strategy.run(function, args=values)


def num_workers(strategy):
    """Returns how many processes train together under a strategy.

    Example:

    >>> num_workers(strategy())
    1
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return max(1, sum(len(cluster.get(job, ())) for job in _WORKER_JOBS))


def is_chief(strategy):
    """Returns whether this process is the one of its workers that saves.

    Example:

    >>> is_chief(strategy())
    True
    """
    return strategy.extended.should_checkpoint


def agree(strategy, number):
    """Returns whether all workers have the same number.

    If they have not, it is false on one of them at least. To be called in
    cross-replica context.

    Args:
        strategy: `tf.distribute.Strategy`.
        number: int.

    Example:

    >>> agree(strategy(), 3)
    True
    """
    if num_workers(strategy) == 1:
        return True
    number = tf.constant(number, tf.int64)
    run_all = tf.function(strategy.run, autograph=False)
    values = run_all(lambda: tf.identity(number))
    sum_of_all = strategy.reduce("SUM", values, axis=None)
    return bool(sum_of_all == number * strategy.num_replicas_in_sync)


def only_all_workers_can_read(strategy, variable):
    """Returns whether reading a variable takes a collective of all workers.

    Example:

    >>> only_all_workers_can_read(strategy(), tf.Variable(1.0))
    False
    """
    return (
        num_workers(strategy) > 1
        and variable.synchronization == tf.VariableSynchronization.ON_READ
        and variable.aggregation != tf.VariableAggregation.ONLY_FIRST_REPLICA
    )


def preemption_check(strategy, is_asked):
    """Returns a function that tells whether all workers stop now.

    To be called by all workers, after every step. One worker that is asked to
    stop is enough, and all stop after the same step, a few steps later.

    Args:
        strategy: `tf.distribute.Strategy`.
        is_asked: callable, () to whether this worker is asked to stop.

    Example:

    >>> check = preemption_check(strategy(), lambda: True)
    >>> check()
    True
    """
    if num_workers(strategy) == 1:
        return is_asked
    agreed = threading.Event()
    # TensorFlow's handler finds the step, in the cluster's coordination
    # service. It would also restore and save: it is given nothing to.
    handler = tf.distribute.experimental.PreemptionCheckpointHandler(
        strategy.cluster_resolver,
        tf.train.CheckpointManager(
            tf.train.Checkpoint(), os.devnull, max_to_keep=1
        ),
        termination_config=tf.distribute.experimental.TerminationConfig(
            termination_watcher_fn=is_asked,
            save_fn=lambda: None,
            exit_fn=agreed.set,
            grace_period=0,
        ),
    )

    def check():
        handler.save_checkpoint_if_preempted()
        return agreed.is_set()

    return check


def lost_worker_error(strategy, error):
    """Returns what to raise for an error if it comes of a lost worker, or None.

    Args:
        strategy: `tf.distribute.Strategy`.
        error: `tf.errors.OpError`.
    """
    workers = num_workers(strategy)
    if workers == 1 or not isinstance(error, _LOST):
        return None
    # What comes before it are the places in the program.
    reason = error.message[max(0, error.message.find(_COLLECTIVE)) :]
    return tf.errors.UnavailableError(
        None,
        None,
        "Another worker was lost. Expected all workers of the cluster to train "
        "until the end; start all of them again, and training goes on from the "
        f"last checkpoint. Received: workers={workers}, error={reason}",
    )


def _buckets(values, size):
    """Yields lists of `(value, start, end)`, of `size` entries altogether."""
    bucket, room = [], size
    for number, value in enumerate(values):
        start, entries = 0, value.shape.num_elements()
        while start < entries:
            end = min(start + room, entries)
            bucket.append((number, start, end))
            room -= end - start
            start = end
            if not room:
                yield bucket
                bucket, room = [], size
    if bucket:
        yield bucket


def _size(value):
    """Returns the bytes of a tensor, 0 where its shape is not known."""
    if isinstance(value, tf.IndexedSlices):
        return 0
    return (value.shape.num_elements() or 0) * value.dtype.size


def _native(value):
    """Returns the `tf.Variable` of a `keras.Variable`, anything else as is."""
    return value.value if isinstance(value, keras.Variable) else value

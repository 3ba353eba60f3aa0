"""Workers: the processes that train together.

Functions of one process about the others: how many there are, which of them
saves, when all of them stop.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

# Jobs of a cluster whose processes train.
_WORKER_JOBS = ("chief", "worker")

# Errors that collectives raise when a worker is gone.
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)
_COLLECTIVE = "Collective ops"


def num_workers(strategy: tf.distribute.Strategy) -> int:
    """Returns how many processes train together under a strategy.

    Example:

    >>> num_workers(tf.distribute.get_strategy())
    1
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return max(1, sum(len(cluster.get(job, ())) for job in _WORKER_JOBS))


def is_synchronous(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether the replicas of a strategy step together.

    Example:

    >>> is_synchronous(tf.distribute.get_strategy())
    True
    """
    return not isinstance(
        strategy,
        (
            tf.distribute.experimental.ParameterServerStrategy,
            tf.compat.v1.distribute.experimental.ParameterServerStrategy,
        ),
    )


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process is the worker that saves.

    Example:

    >>> is_chief(tf.distribute.get_strategy())
    True
    """
    return strategy.extended.should_checkpoint


def agree(strategy: tf.distribute.Strategy, number: int) -> bool:
    """Returns whether all workers have the same number.

    If not, the result is false on at least one of them. Call in cross-replica
    context.

    Args:
        strategy: `tf.distribute.Strategy`.
        number: int, this worker's own.

    Example:

    >>> agree(tf.distribute.get_strategy(), 3)
    True
    """
    if num_workers(strategy) == 1:
        return True
    own = tf.constant(number, tf.int64)
    run_all = tf.function(strategy.run, autograph=False)
    values = run_all(lambda: tf.identity(own))
    sum_of_all = strategy.reduce("SUM", values, axis=None)
    return bool(sum_of_all == own * strategy.num_replicas_in_sync)


def only_all_workers_can_read(
    strategy: tf.distribute.Strategy, variable: Any
) -> bool:
    """Returns whether reading a variable takes a collective of all workers.

    Example:

    >>> strategy = tf.distribute.get_strategy()
    >>> only_all_workers_can_read(strategy, tf.Variable(1.0))
    False
    """
    return (
        num_workers(strategy) > 1
        and variable.synchronization == tf.VariableSynchronization.ON_READ
        and variable.aggregation != tf.VariableAggregation.ONLY_FIRST_REPLICA
    )


def preemption_check(
    strategy: tf.distribute.Strategy, is_asked: Callable[[], bool]
) -> Callable[[], bool]:
    """Returns a function that returns whether all workers stop now.

    All workers call it after every step. If any worker is asked to stop, all
    stop after the same step, a few steps later.

    Args:
        strategy: `tf.distribute.Strategy`.
        is_asked: callable without arguments that returns whether this worker is
            asked to stop.

    Example:

    >>> check = preemption_check(tf.distribute.get_strategy(), lambda: True)
    >>> check()
    True
    """
    if num_workers(strategy) == 1:
        return is_asked
    agreed = threading.Event()
    # TensorFlow's handler agrees on the step through the cluster's coordination
    # service. It would also save and restore: its checkpoint is empty.
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


def lost_worker_error(
    strategy: tf.distribute.Strategy, error: tf.errors.OpError
) -> tf.errors.UnavailableError | None:
    """Returns the error to raise if another worker was lost, else None.

    Args:
        strategy: `tf.distribute.Strategy`.
        error: `tf.errors.OpError` that a step raised.

    Example:

    >>> error = tf.errors.UnavailableError(None, None, "Socket closed")
    >>> lost_worker_error(tf.distribute.get_strategy(), error) is None
    True
    """
    workers = num_workers(strategy)
    if workers == 1 or not isinstance(error, _LOST):
        return None
    # Before it the message lists places in the program.
    reason = error.message[max(0, error.message.find(_COLLECTIVE)) :]
    return tf.errors.UnavailableError(
        None,
        None,
        "Another worker of the cluster was lost. Restart all workers to resume "
        "from the last checkpoint. "
        f"Received: workers={workers}, error={reason}",
    )

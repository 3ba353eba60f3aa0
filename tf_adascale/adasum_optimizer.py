"""Adasum: gradients or updates of the replicas combined, not averaged."""

import keras
import tensorflow as tf

from tf_adascale import adasum, norms, replicas, stepping, wrapper
from tf_adascale import loss_scale as loss_scale_lib

_COMBINE = ("updates", "gradients")

# Variables up to this size are combined as they are, others by their products.
_FEW_ENTRIES = 32


@keras.saving.register_keras_serializable(package="tf_adascale")
class Adasum(wrapper.Wrapper):
    """Combines what the replicas found by Adasum instead of the mean.

    The mean of N gradients steps no further than one of them, Adasum adds up
    what is orthogonal in them and averages what is parallel, per variable:

        Adasum(a, b) = (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

    in a binary tree over neighbouring replicas (see `tf_adascale.adasum`), any
    number of them. One that is left over at the end of a level moves up to the
    next as it is. The inner products that the tree needs are computed once, a
    row by each replica, and summed; the factors that follow from them and the
    sum that they make are then the same everywhere, and so are the weights.

    With `combine="updates"` each replica takes the inner optimizer's step by
    its own gradient, with its own momenta; what is combined are the changes of
    the weights. With `combine="gradients"` the gradients are combined, and one
    step is taken, which the clipping of the inner optimizer sees.

    Micro-batches of `tf_adascale.Model` are inputs of the tree too: first those
    of a replica are combined, by their gradients, then the replicas. So with
    k = 2, 4, 8, ... the tree is that of N k replicas.

    A step with a gradient that is not finite, on any replica, is skipped on all
    of them. Sparse gradients are made dense where gradients are combined; by
    `combine="updates"` the inner optimizer gets them as they are. With one
    sample per step this is the inner optimizer to the bit.

    Each step receives N - 1 times the size of the model and all-reduces it
    once, both in float32 or wider. (Under TPUStrategy TensorFlow gathers by an
    all-reduce of N times the size, which moves about twice as much.) A
    replica holds pieces of 4 MiB of all N at a time, their products with its
    own, and a copy of the model for the combination; for "updates" two more, of
    the weights before and after.

    The learning rate is the inner optimizer's as it is; a schedule counts
    iterations. How far to raise it with N is measured in the README.

    With `combine="updates"` the momenta of the replicas differ. A checkpoint
    holds those of the first, and gives them to all when it is restored.

    Args:
        optimizer: `keras.optimizers.Optimizer`, or a `LossScaleOptimizer`
            around one.
        combine: "updates", or "gradients".
        group_size: int >= 1, samples whose mean is one input of the tree, for
            example those of a host: 1, or a multiple of the micro-batches that
            divides their number on all replicas.
        name: string.

    Attributes:
        inner_optimizer: `optimizer`.

    Raises:
        ValueError: for arguments out of range, an optimizer that cannot be
            wrapped, or arguments that belong to `optimizer`; and at the first
            step, if `group_size` does not fit the replicas.

    Example:

    >>> optimizer = Adasum(keras.optimizers.SGD(0.5))
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer, "mse")
    >>> float(optimizer.learning_rate)
    0.5

    Reference: Maleki et al., "Scaling Distributed Training with Adaptive
    Summation", 2020.
    """

    def __init__(
        self,
        optimizer,
        *,
        combine="updates",
        group_size=1,
        name="adasum",
        **kwargs,
    ):
        if combine not in _COMBINE:
            raise ValueError(
                "There is no such thing to combine. Expected one of "
                f"{_COMBINE}. Received: combine={combine!r}"
            )
        is_int = isinstance(group_size, int) and group_size is not True
        if not is_int or group_size < 1:
            raise ValueError(
                "There is no group of this size. Expected an int >= 1, the "
                "samples that are averaged before they are combined. Received: "
                f"group_size={group_size!r}"
            )
        super().__init__(optimizer, name=name, **kwargs)
        self.combine = combine
        self.group_size = group_size

    @property
    def effective_learning_rate(self):
        """Scalar: the inner optimizer's rate at its iteration."""
        return self.base_learning_rate(tf.convert_to_tensor(self.iterations))

    @property
    def merge_samples(self):
        """Adasum of two samples' gradients; None where groups are averaged."""
        if self.group_size > 1:
            return None
        return lambda left, right: list(map(adasum.pair, left, right))

    def check_samples(self, sample_sqnorm):
        """Refuses groups that the samples do not make up."""
        size, microbatches = self.group_size, self.microbatches
        samples = self.num_replicas * microbatches
        if size > 1 and (size % microbatches or samples % size):
            raise ValueError(
                "The samples do not make up groups of this size. Expected 1, "
                "or a multiple of the micro-batches that divides the product "
                f"of replicas and micro-batches. Received: group_size={size}, "
                f"replicas={self.num_replicas}, microbatches={microbatches}"
            )

    def plan(self, variables, gradients, sample_sqnorm, loss_scale):
        """Returns the step by the combined gradients, or by the replica's."""
        if self.num_replicas > 1:
            # Keras divided the loss by the number of replicas.
            unit = 1 / self.num_replicas
            gradients = [loss_scale_lib.divided(g, unit) for g in gradients]
        if self._takes_own_steps or self.num_replicas == 1:
            (check,) = replicas.total([norms.squared_norm(gradients)])
        else:
            gradients, check = self._combined(
                [_dense(g, v) for g, v in zip(gradients, variables)]
            )
        return wrapper.Step(
            gradients=gradients,
            # A sum is finite only if everything that it sums is.
            finite=tf.math.is_finite(check),
            learning_rate=self.effective_learning_rate,
            base_steps=None,
            assignments=[],
        )

    def get_config(self):
        """Returns the configuration, with the rate that the user gave."""
        return {
            **super().get_config(),
            "combine": self.combine,
            "group_size": self.group_size,
        }

    @property
    def _takes_own_steps(self):
        return self.combine == "updates" and self.num_replicas > 1

    def _take(self, variables, step):
        if self._takes_own_steps:
            step = self._with_updates_combined(variables, step)
        super()._take(variables, step)

    def _with_updates_combined(self, variables, step):
        """Returns the step as assignments, once each replica took its own."""
        before = [tf.convert_to_tensor(v) for v in variables]
        self._if_finite(
            step.finite,
            lambda strategy, *values: stepping.update(
                strategy, self._stepping, variables, *values
            ),
            (step.gradients, step.learning_rate),
        )
        updates = [
            tf.convert_to_tensor(v) - b for v, b in zip(variables, before)
        ]
        combined, _ = self._combined(updates)
        return step._replace(
            gradients=[],
            assignments=[
                (v, b + update)
                for v, b, update in zip(variables, before, combined)
            ],
        )

    def _combined(self, tensors):
        """Returns the Adasum over the replicas, and what tells of overflows."""
        wide = any(tensor.dtype == tf.float64 for tensor in tensors)
        dtype = tf.float64 if wide else tf.float32
        sizes = [tensor.shape.num_elements() for tensor in tensors]
        small = [i for i, size in enumerate(sizes) if size <= _FEW_ENTRIES]
        large = [i for i, size in enumerate(sizes) if size > _FEW_ENTRIES]
        parts, checks = {}, []
        if small:
            rows = self._combined_rows([tensors[i] for i in small], dtype)
            checks.append(rows)
            # Summed like the others, so that all replicas have the same bits.
            rows *= tf.cast(replicas.index() == 0, dtype)
            for i, row in zip(small, tf.unstack(rows)):
                parts[i] = tf.reshape(row[: sizes[i]], tensors[i].shape)
        if large:
            products = replicas.inner_products([tensors[i] for i in large])
            checks.append(products)
            for i, factor in zip(large, tf.unstack(self._factors(products))):
                parts[i] = tf.cast(tensors[i], dtype) * tf.cast(factor, dtype)
        totals = replicas.total([parts[i] for i in range(len(tensors))])
        return [
            tf.cast(total, tensor.dtype)
            for total, tensor in zip(totals, tensors)
        ], tf.add_n([tf.reduce_sum(tf.cast(x, dtype)) for x in checks])

    def _factors(self, products):
        """Returns the factor of this replica's part, for each variable."""
        groups, size = self._groups
        products = tf.reshape(products, [-1, groups, size, groups, size])
        factors = adasum.coefficients(tf.reduce_mean(products, [2, 4])) / size
        return tf.gather(factors, replicas.index() // size, axis=1)

    def _combined_rows(self, tensors, dtype):
        """Returns the Adasum of small tensors, as rows with zeros at the end.

        These would suffer from rounding, see `adasum.coefficients`.
        """
        groups, size = self._groups
        flat = [tf.reshape(tf.cast(x, dtype), [-1]) for x in tensors]
        rows = tf.stack(
            [tf.pad(x, [[0, _FEW_ENTRIES - tf.size(x)]]) for x in flat]
        )
        rows = tf.ensure_shape(rows, (len(tensors), _FEW_ENTRIES))
        everyone = tf.reshape(
            replicas.gathered(rows), [groups, size, *rows.shape]
        )
        means = tf.reduce_mean(everyone, 1)
        return adasum.combined_rows(tf.transpose(means, [1, 0, 2]))

    @property
    def _groups(self):
        """Int, groups of replicas; int, replicas in each."""
        # A replica is a mean of its samples already.
        size = max(self.group_size // self.microbatches, 1)
        return self.num_replicas // size, size


def _dense(gradient, variable):
    """Returns a gradient as a tensor of its variable's shape."""
    if isinstance(gradient, tf.IndexedSlices):
        gradient = tf.convert_to_tensor(
            tf.IndexedSlices(
                gradient.values, gradient.indices, tf.shape(variable)
            )
        )
    return tf.ensure_shape(gradient, variable.shape)

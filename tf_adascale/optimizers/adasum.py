"""Adasum: gradients or updates of the replicas combined, not averaged."""

from collections.abc import Callable
from typing import Any, Literal

import keras
import tensorflow as tf

from tf_adascale.distribute import collectives
from tf_adascale.ops import _arguments, norms
from tf_adascale.ops import adasum as adasum_ops
from tf_adascale.optimizers import inner_step, wrapper
from tf_adascale.optimizers import loss_scale as loss_scale_lib

# Variables up to this size are combined as they are, others by their products.
_FEW_ENTRIES = 32


@keras.saving.register_keras_serializable(package="tf_adascale")
class Adasum(wrapper.Wrapper):
    """Combines the replicas' gradients or updates by Adasum, not by the mean.

    The mean of N gradients steps no further than one of them. Adasum adds their
    orthogonal parts and averages their parallel parts, per variable:

        Adasum(a, b) = (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

    in a binary tree over neighbouring replicas (see `tf_adascale.ops.adasum`),
    for any number of them. A replica without a neighbour at one level moves up
    to the next unchanged. Each replica computes one row of the inner products
    that the tree needs, and an all-reduce adds the rows. The factors and the
    weighted sum that follow are then the same everywhere, and so are the
    weights.

    With `combine="updates"` each replica takes the inner optimizer's step by
    its own gradient, with its own momenta, and the changes of the weights are
    combined. With `combine="gradients"` the gradients are combined and one step
    is taken; the inner optimizer's clipping acts on the combined gradient.

    Micro-batches of `tf_adascale.Model` are inputs of the tree too: first those
    of a replica are combined, by their gradients, then the replicas. With
    k = 2, 4, 8, ... micro-batches the tree is that of N k replicas.

    A gradient that is not finite, on any replica, skips the step on all of
    them. Sparse gradients become dense where gradients are combined. With
    `combine="updates"` the inner optimizer gets them unchanged. With one sample
    per step this is the inner optimizer to the bit.

    Each step receives N - 1 times the size of the model and all-reduces it
    once, both in float32 or wider. (Under TPUStrategy TensorFlow gathers by an
    all-reduce of N times the size, which moves about twice as much.) At a time
    a replica holds a piece of 4 MiB of every replica, their products with its
    own, and a copy of the model for the combination; "updates" adds two more
    copies, of the weights before and after.

    The learning rate is the inner optimizer's, unchanged; a schedule counts
    iterations. The documentation measures how far to raise it with N.

    With `combine="updates"` the momenta of the replicas differ. A checkpoint
    holds those of the first replica and restores them on all.

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, or a `LossScaleOptimizer`
            around one.
        combine: "updates", or "gradients".
        group_size: int >= 1, samples whose mean is one input of the tree, for
            example those of a host: 1, or a multiple of the micro-batches that
            divides their number on all replicas.
        name: string.

    Attributes:
        inner_optimizer: the argument.

    Raises:
        ValueError: for arguments out of range, an optimizer that cannot be
            wrapped, or arguments that belong to `inner_optimizer`; and at the
            first step, if `group_size` does not fit the replicas.

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
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        combine: Literal["updates", "gradients"] = "updates",
        group_size: int = 1,
        name: str = "adasum",
        **kwargs: Any,
    ):
        _arguments.one_of("combine", combine, ("updates", "gradients"))
        _arguments.integer(
            "group_size",
            group_size,
            meaning="the samples averaged before they are combined",
        )
        super().__init__(inner_optimizer, name=name, **kwargs)
        self.combine = combine
        self.group_size = group_size

    @property
    def effective_learning_rate(self) -> tf.Tensor:
        """Scalar: the inner optimizer's rate at its iteration."""
        return self.base_learning_rate(self.iterations)

    @property
    def merge_samples(
        self,
    ) -> Callable[[list[Any], list[Any]], list[Any]] | None:
        """Adasum of two samples' gradients; None where groups are averaged."""
        if self.group_size > 1:
            return None
        return lambda left, right: list(map(adasum_ops.pair, left, right))

    def check_step(self, sample_sqnorm_sum: tf.Tensor | None) -> None:
        """Refuses groups that the samples do not make up."""
        size, microbatches = self.group_size, self.microbatches
        samples = self.num_replicas * microbatches
        if size > 1 and (size % microbatches or samples % size):
            raise ValueError(
                "`group_size` must be 1, or a multiple of the micro-batches "
                "that divides replicas x micro-batches. Received: "
                f"group_size={size}, replicas={self.num_replicas}, "
                f"microbatches={microbatches}"
            )

    def plan_step(
        self,
        variables: list[Any],
        gradients: list[Any],
        sample_sqnorm_sum: tf.Tensor | None,
        loss_scale: Any,
    ) -> inner_step.Step:
        """Returns the step by the combined gradients, or by each replica's."""
        if self.num_replicas > 1:
            # Keras divided the loss by the number of replicas.
            unit = 1 / self.num_replicas
            gradients = [loss_scale_lib.unscale(g, unit) for g in gradients]
        takes_own_step = self.combine == "updates" and self.num_replicas > 1
        if takes_own_step or self.num_replicas == 1:
            (check,) = collectives.total([norms.squared_norm(gradients)])
        else:
            gradients, check = self._combined(
                [_dense(g, v) for g, v in zip(gradients, variables)]
            )
        return inner_step.Step(
            gradients=gradients,
            # A sum is finite only if everything that it sums is.
            finite=tf.math.is_finite(check),
            learning_rate=self.effective_learning_rate,
            combine_updates=(
                (lambda changes: self._combined(changes)[0])
                if takes_own_step
                else None
            ),
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration, with the rate that the user gave."""
        return {
            **super().get_config(),
            "combine": self.combine,
            "group_size": self.group_size,
        }

    def _combined(self, tensors):
        """Returns the Adasum over the replicas, and a sum of its terms."""
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
            rows *= tf.cast(collectives.index() == 0, dtype)
            for i, row in zip(small, tf.unstack(rows)):
                parts[i] = tf.reshape(row[: sizes[i]], tensors[i].shape)
        if large:
            products = collectives.inner_products([tensors[i] for i in large])
            checks.append(products)
            for i, factor in zip(large, tf.unstack(self._factors(products))):
                parts[i] = tf.cast(tensors[i], dtype) * tf.cast(factor, dtype)
        totals = collectives.total([parts[i] for i in range(len(tensors))])
        return [
            tf.cast(total, tensor.dtype)
            for total, tensor in zip(totals, tensors)
        ], tf.add_n([tf.reduce_sum(tf.cast(x, dtype)) for x in checks])

    def _factors(self, products):
        """Returns the factor of this replica's part, for each variable."""
        groups, size = self._groups
        products = tf.reshape(products, [-1, groups, size, groups, size])
        of_groups = tf.reduce_mean(products, [2, 4])
        factors = adasum_ops.coefficients(of_groups) / size
        return tf.gather(factors, collectives.index() // size, axis=1)

    def _combined_rows(self, tensors, dtype):
        """Returns the Adasum of small tensors, as rows padded with zeros.

        Inner products would lose too much of these to rounding, see
        `adasum.coefficients`.
        """
        groups, size = self._groups
        flat = [tf.reshape(tf.cast(x, dtype), [-1]) for x in tensors]
        rows = tf.stack(
            [tf.pad(x, [[0, _FEW_ENTRIES - tf.size(x)]]) for x in flat]
        )
        rows = tf.ensure_shape(rows, (len(tensors), _FEW_ENTRIES))
        everyone = tf.reshape(
            collectives.gathered(rows), [groups, size, *rows.shape]
        )
        means = tf.reduce_mean(everyone, 1)
        return adasum_ops.combine_rows(tf.transpose(means, [1, 0, 2]))

    @property
    def _groups(self):
        """Int, groups of replicas; int, replicas in each."""
        # A replica's gradient is the mean of its samples already.
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

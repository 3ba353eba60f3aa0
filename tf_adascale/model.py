"""A `keras.Model` whose training works under every strategy.

Where `keras.Model` fails, this one

* takes several gradient samples per replica and step (`microbatches`), with one
  reduction over the replicas at the end, while Keras's gradient accumulation
  fails under a multi-device strategy;
* compiles each replica's forward and backward pass with XLA and keeps the
  collectives outside (`jit_compile`);
* loops over batches around `strategy.run` (`steps_per_execution`);
* builds from, and reduces over, the workers of a MultiWorkerMirroredStrategy.

The only module that knows what Keras models do not document. Checked on Keras
3.10 to 3.15, these are

    Functional               the class of models made from inputs and outputs
    _maybe_symbolic_build    builds a model from an iterator's first batch
    _symbolic_build          builds a model from a batch
    _distribute_strategy     the strategy the model was made under, or None
    _loss_tracker            the metric `loss`
"""

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from tf_adascale import norms, replicas, wrapper

_UNEVEN = "Micro-batches do not divide the batch."


class Model(keras.Model):
    """`keras.Model` that trains with micro-batches and under every strategy.

    Made from inputs and outputs, or subclassed with a `call`, like
    `keras.Model`; `fit`, `evaluate`, `predict` and saving are Keras's.

    Example:

    >>> inputs = keras.Input((4,))
    >>> model = Model(inputs, keras.layers.Dense(1)(inputs))
    >>> model.compile("sgd", "mse", microbatches=2)
    >>> x, y = tf.ones((8, 4)), tf.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=4, verbose=0)
    >>> model.microbatches
    2
    """

    def __new__(cls, *args, **kwargs):
        """Returns a functional model where inputs and outputs are given."""
        if cls is Model and _is_functional(args, kwargs):
            cls = FunctionalModel
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        if _is_functional(args, kwargs):
            if not isinstance(self, Functional):
                _make_functional(type(self))
            Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)
        self.microbatches = 1

    def compile(
        self,
        optimizer="rmsprop",
        *args,
        microbatches=1,
        auto_scale_loss=True,
        **kwargs,
    ):
        """Configures training.

        Args:
            optimizer: as for `keras.Model`.
            *args: as for `keras.Model.compile`.
            microbatches: int >= 1, k. Each replica's batch is split in k, each
                part one gradient sample with its own batch statistics; the mean
                of their gradients is applied. k must divide the batch.
            auto_scale_loss: as for `keras.Model`, except that under the policy
                "mixed_float16" the `LossScaleOptimizer` goes inside AdaScale,
                which looks for overflows on every replica.
            **kwargs: as for `keras.Model.compile`. With `jit_compile=True` XLA
                compiles each replica's forward and backward pass and squared
                norm in training, under every strategy; "auto" leaves it off
                under one.

        Raises:
            ValueError: if `microbatches` is not an int >= 1.
        """
        if not isinstance(microbatches, int) or microbatches < 1:
            raise ValueError(
                "A batch cannot be split in this many parts. Expected an int "
                f">= 1. Received: microbatches={microbatches!r}"
            )
        optimizer = keras.optimizers.get(optimizer)
        if isinstance(optimizer, wrapper.Wrapper):
            optimizer.microbatches = microbatches
            if auto_scale_loss and self.dtype_policy.name == "mixed_float16":
                optimizer.add_loss_scale()
            auto_scale_loss = False
        super().compile(
            optimizer, *args, auto_scale_loss=auto_scale_loss, **kwargs
        )
        self.microbatches = microbatches
        self._compute = tf.function(
            self._gradients,
            autograph=False,
            jit_compile=True,
            reduce_retracing=True,
        )
        if not self.jit_compile:
            self._compute = self._gradients

    def get_compile_config(self):
        """Returns the arguments of `compile`, serialized."""
        config = super().get_compile_config()
        return {**config, "microbatches": self.microbatches} if config else {}

    def compile_from_config(self, config):
        """Compiles the model with what `get_compile_config` returned."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    # One step of one replica.

    def train_step(self, data):
        """Takes one training step on a replica's batch; returns the metrics."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        parts = x, y, sample_weight
        if self.microbatches > 1:
            parts = _mapped(lambda v: _split(v, self.microbatches), parts)
        gradients, sqnorm, loss, y_pred = self._compute(*parts)
        self._loss_tracker.update_state(loss, sample_weight=_length(x))
        statistics = {} if sqnorm is None else {"sample_sqnorm": sqnorm}
        self.optimizer.apply(gradients, self.trainable_variables, **statistics)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _gradients(self, x, y, sample_weight):
        """Returns what one step needs of a replica's forward and backward pass.

        Args:
            x: inputs, split in micro-batches along a new first axis if there
                are several.
            y: targets, likewise.
            sample_weight: weights or None, likewise.

        Returns:
            A tuple of the mean of the samples' gradients, as the optimizer
            wants it; the sum of their squared norms, or None if it does not
            want it; the mean loss; and the predictions for the whole batch.
        """
        if self.microbatches == 1:
            return self._sample(x, y, sample_weight)
        count = self.microbatches
        sample = tf.function(self._sample, autograph=False)

        def part(index):
            return _mapped(lambda v: v[index], (x, y, sample_weight))

        # One trace, for the types of the loop's variables and for its body.
        gradients, sqnorm, loss, y_pred = sample.get_concrete_function(
            *part(0)
        ).structured_outputs
        connected = [g is not None for g in gradients]
        sums = (
            [
                tf.zeros(variable.shape, variable.dtype)
                for variable, present in zip(
                    self.trainable_variables, connected
                )
                if present
            ],
            None if sqnorm is None else tf.zeros((), sqnorm.dtype),
            tf.zeros((), loss.dtype),
        )
        outputs = [
            tf.TensorArray(spec.dtype, count, element_shape=spec.shape)
            for spec in tf.nest.flatten(y_pred)
        ]

        def add(index, sums, outputs):
            gradients, sqnorm, loss, y_pred = sample(*part(index))
            present = [g for g in gradients if g is not None]
            sums = tf.nest.map_structure(
                lambda total, value: total + tf.convert_to_tensor(value),
                sums,
                (present, sqnorm, loss),
            )
            outputs = [
                array.write(index, value)
                for array, value in zip(outputs, tf.nest.flatten(y_pred))
            ]
            return index + 1, sums, outputs

        _, (totals, sqnorm, loss), outputs = tf.while_loop(
            lambda index, *_: index < count, add, (0, sums, outputs)
        )
        totals = iter(totals)
        gradients = [next(totals) / count if c else None for c in connected]
        y_pred = tf.nest.pack_sequence_as(
            y_pred, [array.concat() for array in outputs]
        )
        return gradients, sqnorm, loss / count, y_pred

    def _sample(self, x, y, sample_weight):
        """Returns `_gradients` for one gradient sample."""
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight
            )
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, self.trainable_variables)
        sqnorm = None
        if getattr(self.optimizer, "wants_sample_sqnorms", False):
            sqnorm = norms.squared_norm(gradients)
        # Keras divided the loss by the number of replicas.
        num_replicas = self.distribute_strategy.num_replicas_in_sync
        return gradients, sqnorm, loss * num_replicas, y_pred

    # Executions: steps of all replicas.

    def make_train_function(self, force=False):
        """Returns the function of an iterator that takes the training steps."""
        if force or self.train_function is None:
            self.train_function = self._executor(self.train_step)
        return self.train_function

    def make_test_function(self, force=False):
        """Returns the function of an iterator that takes the test steps."""
        if force or self.test_function is None:
            self.test_function = self._executor(self.test_step)
        return self.test_function

    def make_predict_function(self, force=False):
        """Returns the function of a list of batches that predicts them."""
        jit_compile = self.jit_compile
        # Keras 3.10 compiles the replicas of a strategy as one XLA program,
        # which cannot reach the weights on other devices.
        self.jit_compile = jit_compile and self._distribute_strategy is None
        super().make_predict_function(force=force)
        self.jit_compile = jit_compile
        return self.predict_function

    def _executor(self, step):
        strategy = self.distribute_strategy

        def run(batch):
            return replicas.run(strategy, step, _without_optionals(batch))

        def reduce(outputs):
            return _mapped(lambda v: replicas.mean(strategy, v), outputs)

        def run_once(batch):
            return reduce(run(batch))

        def execute(iterator):
            # The first step outside the loop, to know what a step returns.
            outputs = run(iterator.get_next())

            def go_on(steps, has_value, _):
                return has_value & (steps < self.steps_per_execution)

            def again(steps, _, outputs):
                batch = iterator.get_next_as_optional()
                outputs = tf.cond(
                    batch.has_value(),
                    lambda: run(batch.get_value()),
                    lambda: outputs,
                )
                return steps + 1, batch.has_value(), outputs

            if self.steps_per_execution > 1:
                _, _, outputs = tf.while_loop(
                    go_on, again, (1, tf.constant(True), outputs)
                )
            return reduce(outputs)

        if not self.run_eagerly:
            options = {"autograph": False, "reduce_retracing": True}
            execute = tf.function(execute, **options)
            run_once = tf.function(run_once, **options)

        def executor(iterator):
            try:
                if hasattr(iterator, "get_next_as_optional"):
                    return execute(iterator)
                # A Python iterator, of train_on_batch and test_on_batch.
                outputs = {}
                for _, batch in zip(range(self.steps_per_execution), iterator):
                    outputs = run_once(batch)
                return outputs
            except tf.errors.InvalidArgumentError as error:
                if _UNEVEN in error.message:
                    raise _uneven_error(error.message) from error
                raise

        return executor

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Builds from a replica's part of the first batch what is not built."""
        strategy = self.distribute_strategy
        deferred = self.built or self.microbatches == 1
        if self._distribute_strategy is None and deferred:
            return
        if iterator is not None:
            *_, batches = next(iter(iterator))
            data_batch = _without_optionals(next(batches))
        with strategy.scope():
            self._symbolic_build(
                data_batch=_mapped(
                    lambda v: replicas.local(strategy, v), data_batch
                )
            )


class FunctionalModel(Model, Functional):
    """A `Model` made from inputs and outputs."""


keras.saving.register_keras_serializable("tf_adascale", "Model")(
    FunctionalModel
)


def _is_functional(args, kwargs):
    """Returns whether `Model` is called with inputs and outputs."""
    names = ("inputs", "outputs")[len(args) :]
    return len(args) <= 2 and all(name in kwargs for name in names)


def _make_functional(cls):
    """Makes a subclass of `Model` a subclass of `FunctionalModel`.

    Keras does the same to subclasses of `keras.Model`; done to `Model` itself
    it would break every subclass that has a `call`.
    """
    cls.__bases__ = tuple(
        FunctionalModel if base is Model else base for base in cls.__bases__
    )
    for base in cls.__bases__:
        if issubclass(base, Model) and not issubclass(base, Functional):
            _make_functional(base)


def _mapped(function, structure):
    return keras.tree.map_structure(
        lambda v: None if v is None else function(v), structure
    )


def _without_optionals(batch):
    """Puts None where Keras 3.15 has an empty `tf.experimental.Optional`."""
    return _mapped(
        lambda v: None if isinstance(v, tf.experimental.Optional) else v, batch
    )


def _length(x):
    return tf.shape(next(v for v in keras.tree.flatten(x) if v is not None))[0]


def _split(batch, count):
    """Returns a batch as `count` parts, along a new first axis."""
    size = batch.shape[0]
    if size is None:
        size = tf.shape(batch)[0]
        check = tf.debugging.Assert(
            tf.equal(size % count, 0), [_UNEVEN, size, count]
        )
        with tf.control_dependencies([check]):
            batch = tf.identity(batch)
    elif size % count:
        raise _uneven_error(f"batch={size}, microbatches={count}")
    rest = batch.shape[1:]
    if rest.is_fully_defined():
        return tf.reshape(batch, [count, -1, *rest])
    return tf.reshape(batch, tf.concat([[count, -1], tf.shape(batch)[1:]], 0))


def _uneven_error(received):
    return ValueError(
        f"{_UNEVEN} Expected a batch per replica that is a multiple of "
        "`microbatches`; does the last batch of the dataset need "
        f"drop_remainder=True? Received: {received}"
    )

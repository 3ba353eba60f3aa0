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
    _keras_mask              the mask of a tensor; compiled metrics look for it
"""

import contextlib

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from tf_adascale import microbatches, replicas, wrapper


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
                of their gradients is applied. k must divide the batch. A loss
                that Keras averages over weights or masks is averaged within
                each part.
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
        is_int = isinstance(microbatches, int) and microbatches is not True
        if not is_int or microbatches < 1:
            raise ValueError(
                "A batch cannot be split in this many parts. Expected an int "
                f">= 1. Received: microbatches={microbatches!r}"
            )
        optimizer = keras.optimizers.get(optimizer)
        is_wrapper = isinstance(optimizer, wrapper.Wrapper)
        super().compile(
            optimizer,
            *args,
            auto_scale_loss=auto_scale_loss and not is_wrapper,
            **kwargs,
        )
        self.microbatches = microbatches
        if is_wrapper:
            optimizer.microbatches = microbatches
            if auto_scale_loss and self.dtype_policy.name == "mixed_float16":
                optimizer.add_loss_scale()
        self._compute = self._gradients
        if self.jit_compile:
            self._compute = tf.function(
                self._gradients,
                autograph=False,
                jit_compile=True,
                reduce_retracing=True,
            )

    def get_compile_config(self):
        """Returns the arguments of `compile`, serialized."""
        config = super().get_compile_config()
        return {**config, "microbatches": self.microbatches} if config else {}

    def compile_from_config(self, config):
        """Compiles the model with what `get_compile_config` returned."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def load_weights(self, filepath, **kwargs):
        """Loads the weights, and the optimizer's state if the file has it."""
        optimizer = getattr(self, "optimizer", None)
        if self.built and optimizer is not None and not optimizer.built:
            with self.distribute_strategy.scope():
                optimizer.build(self.trainable_variables)
        super().load_weights(filepath, **kwargs)

    def fit(self, *args, **kwargs):
        """Trains as `keras.Model.fit` does; of several workers the chief shows.

        Raises:
            tf.errors.UnavailableError: if another worker is lost.
        """
        with self._among_workers(args, kwargs, place_of_verbose=4):
            return super().fit(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Evaluates as `keras.Model.evaluate` does; see `fit`."""
        with self._among_workers(args, kwargs, place_of_verbose=3):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """Predicts as `keras.Model.predict` does; see `fit`."""
        with self._among_workers(args, kwargs, place_of_verbose=2):
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _among_workers(self, args, kwargs, *, place_of_verbose):
        strategy = self.distribute_strategy
        if not replicas.is_chief(strategy) and len(args) <= place_of_verbose:
            kwargs.setdefault("verbose", 0)
        try:
            yield
        except tf.errors.OpError as error:
            lost = replicas.lost_worker_error(strategy, error)
            if lost is None:
                raise
            raise lost from error

    # One step of one replica.

    def train_step(self, data):
        """Takes one training step on a replica's batch; returns the metrics."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        parts = x, y, sample_weight
        if self.microbatches > 1:
            parts = _mapped(
                lambda v: microbatches.split(v, self.microbatches), parts
            )
        gradients, sqnorm, loss, (y_pred, masks) = self._compute(*parts)
        _put_masks(y_pred, masks)
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
            want it; the mean loss; and a tuple of the predictions for the whole
            batch and their masks.
        """
        count = self.microbatches
        if count == 1:
            return self._sample(x, y, sample_weight)

        def sample(*part):
            gradients, sqnorm, loss, outputs = self._sample(*part)
            dense = [
                None if g is None else tf.ensure_shape(g, v.shape)
                for g, v in zip(gradients, self.trainable_variables)
            ]
            return dense, [sqnorm, loss], outputs

        merge = getattr(self.optimizer, "merge_samples", None)
        gradients, (sqnorm, loss), outputs = microbatches.summed(
            sample, [x, y, sample_weight], count, merge=merge
        )
        if merge is None:
            gradients = [None if g is None else g / count for g in gradients]
        return gradients, sqnorm, loss / count, outputs

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
            sqnorm = self.optimizer.sample_sqnorm(
                gradients, self.trainable_variables
            )
        # Keras divided the loss by the number of replicas.
        num_replicas = self.distribute_strategy.num_replicas_in_sync
        outputs = y_pred, keras.tree.map_structure(_mask, y_pred)
        return gradients, sqnorm, loss * num_replicas, outputs

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

        def step_of_replica(batch):
            # Keras 3.10 run eagerly returns floats, of which there is no mean.
            return _mapped(tf.convert_to_tensor, step(batch))

        def run(batch):
            batch = _without_optionals(batch)
            return replicas.run(strategy, step_of_replica, batch)

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
                uneven = microbatches.uneven_error(error)
                if uneven is None:
                    raise
                raise uneven from error

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


def _mask(tensor):
    return getattr(tensor, "_keras_mask", None)


def _put_masks(tensors, masks):
    """Puts masks on tensors: they do not survive a `tf.function`."""
    for tensor, mask in zip(tf.nest.flatten(tensors), tf.nest.flatten(masks)):
        if mask is not None:
            tensor._keras_mask = mask


def _length(x):
    return tf.shape(next(v for v in keras.tree.flatten(x) if v is not None))[0]

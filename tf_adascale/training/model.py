"""A `keras.Model` whose training works under every strategy.

Under strategies where `keras.Model` fails, this one

* takes several gradient samples per replica and step (`microbatches`) and
  reduces once, unconditionally;
* compiles each replica's forward and backward pass with XLA and keeps the
  collectives outside (`jit_compile`);
* loops over batches around `strategy.run` (`steps_per_execution`);
* builds from one worker's part of a batch, and reduces over all workers.

Relies on what Keras models do not document. Checked on Keras 3.10 to 3.15,
these are

    Functional               the class of models made from inputs and outputs
    _maybe_symbolic_build    builds a model from an iterator's first batch
    _symbolic_build          builds a model from a batch
    _distribute_strategy     the strategy the model was made under, or None
    _compile_loss            the compiled losses, or None
    _compute_loss            calls `compute_loss` with what it takes
    _call_has_training_arg   whether `call` takes `training`
    _loss_tracker            the metric `loss`
    _keras_mask              the mask of a tensor; compiled metrics look for it
"""

import contextlib
import warnings
from typing import Any, Literal

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from tf_adascale.distribute import updates, workers
from tf_adascale.ops import _arguments, _keras
from tf_adascale.optimizers import checks, overwrites, wrapper
from tf_adascale.training import executor, losses, microbatches


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

    def __new__(cls, *args: Any, **kwargs: Any) -> "Model":
        """Returns a functional model where inputs and outputs are given."""
        if cls is Model and _is_functional(args, kwargs):
            cls = FunctionalModel
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        _keras.check_backend()
        if _is_functional(args, kwargs):
            given = {**dict(zip(("inputs", "outputs"), args)), **kwargs}
            for name in ("inputs", "outputs"):
                _keras.check_version(name, keras.tree.flatten(given[name]))
            if not isinstance(self, Functional):
                _make_functional(type(self))
            Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)
        self.microbatches = 1
        self._is_in_sample = False
        self._has_split = False

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | Literal["auto"] = "auto",
        auto_scale_loss: bool = True,
        *,
        microbatches: int = 1,
    ) -> None:
        """Configures training as `keras.Model` does, with micro-batches.

        Args:
            optimizer: as for `keras.Model`.
            loss: as for `keras.Model`.
            loss_weights: as for `keras.Model`.
            metrics: as for `keras.Model`.
            weighted_metrics: as for `keras.Model`.
            run_eagerly: as for `keras.Model`.
            steps_per_execution: as for `keras.Model`.
            jit_compile: bool or "auto". True compiles each replica's forward
                and backward pass and squared norm in training by XLA, under
                every strategy. "auto" leaves it off under a strategy.
            auto_scale_loss: as for `keras.Model`, except that under the policy
                "mixed_float16" the `LossScaleOptimizer` goes inside AdaScale,
                which looks for overflows on every replica.
            microbatches: int >= 1, k, which must divide each replica's batch.
                The batch is split in k parts. Each part is one gradient sample
                with its own batch statistics, and the mean of their gradients
                is applied. A loss that Keras averages over weights or masks is
                averaged within each part. A compiled loss with reduction="sum"
                is summed over the parts, as for the whole batch; a sum that a
                `compute_loss` of your own makes is averaged.

        Raises:
            ValueError: if `microbatches` is not an int >= 1; for objects of
                Keras 2 and for `ParameterServerStrategy`; for micro-batches and
                an optimizer that has a tf_adascale one inside or a loss without
                reduction.
        """
        _arguments.integer(
            "microbatches",
            microbatches,
            meaning="the gradient samples that each replica takes per step",
        )
        checks.check_strategy(self.distribute_strategy)
        _keras.check_version("optimizer", [optimizer])
        _keras.check_layers(self)
        optimizer = wrapper.with_scale_inside(keras.optimizers.get(optimizer))
        is_wrapper = isinstance(optimizer, wrapper.Wrapper)
        if microbatches > 1 and not is_wrapper:
            checks.check_has_no_wrapper(optimizer, wrapper.Wrapper)
        if microbatches > 1:
            losses.check(loss)
        super().compile(
            optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss and not is_wrapper,
        )
        self.microbatches = microbatches
        if is_wrapper:
            optimizer.microbatches = microbatches
            if auto_scale_loss and self.dtype_policy.name == "mixed_float16":
                optimizer.scale_inside()
        if self._compile_loss is not None:
            losses.multiply_sums(
                self._compile_loss,
                lambda: self.microbatches if self._is_in_sample else 1,
            )
        self._compiled_pass = None

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, serialized."""
        config = super().get_compile_config()
        return {**config, "microbatches": self.microbatches} if config else {}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model with what `get_compile_config` returned."""
        if type(self).compile is not Model.compile:
            super().compile_from_config(config)  # Warns and does nothing.
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does; only the chief shows progress.

        Raises:
            tf.errors.UnavailableError: if another worker is lost.
        """
        with self._among_workers(args, kwargs, place_of_verbose=4):
            return super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as `keras.Model.evaluate` does; see `fit`."""
        with self._among_workers(args, kwargs, place_of_verbose=3):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts as `keras.Model.predict` does; see `fit`."""
        with self._among_workers(args, kwargs, place_of_verbose=2):
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _among_workers(self, args, kwargs, *, place_of_verbose):
        strategy = self.distribute_strategy
        if not workers.is_chief(strategy) and len(args) <= place_of_verbose:
            kwargs.setdefault("verbose", 0)
        try:
            yield
        except tf.errors.OpError as error:
            lost = workers.lost_worker_error(strategy, error)
            if lost is None:
                raise
            raise lost from error

    # One step of one replica.

    def train_step(self, data: Any) -> dict[str, Any]:
        """Takes one training step on a replica's batch; returns the metrics."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        parts = x, y, sample_weight
        if self.microbatches > 1:
            self._has_split = True
            parts = executor.map_present(
                lambda v: microbatches.split(v, self.microbatches), parts
            )
        compute = self._compiled() if self.jit_compile else self._gradients
        gradients, sqnorm, loss, (y_pred, masks) = compute(*parts)
        executor.put_masks(y_pred, masks)
        self._loss_tracker.update_state(loss, sample_weight=executor.length(x))
        if gradients:
            statistics = {} if sqnorm is None else {"sample_sqnorm_sum": sqnorm}
            self.optimizer.apply_gradients(
                zip(gradients, self.trainable_variables), **statistics
            )
        else:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=2
            )
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _compiled(self):
        """Returns `_gradients` compiled by XLA for the present variables."""
        compiled = self._compiled_pass
        if compiled is None or not compiled.is_of(self.trainable_variables):
            self._compiled_pass = compiled = executor.CompiledPass(
                self._gradients, self.trainable_variables
            )
        return compiled.function

    def _gradients(self, x, y, sample_weight):
        """Runs a replica's forward and backward pass.

        Args:
            x: inputs; several micro-batches are split along a new first axis.
            y: targets, likewise.
            sample_weight: weights or None, likewise.

        Returns:
            A tuple of the mean of the samples' gradients, or what the optimizer
            merges them to; the sum of their squared norms, or None if the
            optimizer does not need it; the mean loss; and a tuple of the
            predictions for the whole batch and their masks.
        """
        count = self.microbatches
        if count == 1:
            return self._sample(x, y, sample_weight)

        def sample(*part):
            gradients, sqnorm, loss, outputs = self._sample(*part)
            losses.check_is_scalar(loss)
            variables = self.trainable_variables  # `_sample` may build some.
            dense = [
                None if g is None else tf.ensure_shape(g, v.shape)
                for g, v in zip(gradients, variables)
            ]
            pairs = overwrites.split(dense, variables)
            return microbatches.Result(
                pairs.gradients, [sqnorm, loss], outputs, pairs.new_values
            )

        merge = getattr(self.optimizer, "merge_samples", None)
        result = microbatches.summed(
            sample, [x, y, sample_weight], count, merge=merge
        )
        means = result.samples
        if merge is None:
            means = [None if g is None else g / count for g in means]
        gradients = overwrites.join(
            means, result.maxima, self.trainable_variables
        )
        sqnorm, loss = result.terms
        return gradients, sqnorm, loss / count, result.outputs

    def _sample(self, x, y, sample_weight):
        """Returns `_gradients` for one gradient sample."""
        with tf.GradientTape() as tape:
            takes_training = self._call_has_training_arg
            y_pred = self(x, training=True) if takes_training else self(x)
            self._is_in_sample = True
            try:
                loss = self._compute_loss(
                    x=x,
                    y=y,
                    y_pred=y_pred,
                    sample_weight=sample_weight,
                    training=True,
                )
            finally:
                self._is_in_sample = False
            optimizer: Any = self.optimizer
            scaled_loss = loss
            if optimizer is not None:
                scaled_loss = optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        sqnorm = None
        is_wrapper = isinstance(optimizer, wrapper.Wrapper)
        if variables and is_wrapper and optimizer.needs_sample_sqnorms:
            sqnorm = optimizer.sample_sqnorm(gradients, variables)
        # Keras divided the loss by the number of replicas.
        num_replicas = self.distribute_strategy.num_replicas_in_sync
        outputs = y_pred, executor.masks(y_pred)
        return gradients, sqnorm, loss * num_replicas, outputs

    # Executions: steps of all replicas.

    def make_train_function(self, force: bool = False) -> Any:
        """Returns the function of an iterator that takes the training steps."""
        if force or self.train_function is None:
            self._compiled_pass = None
            self.train_function = self._executor(self._checked_train_step)
        return self.train_function

    def _checked_train_step(self, data):
        """Takes the training step, which must take the micro-batches."""
        self._has_split = False
        if isinstance(self.optimizer, wrapper.Wrapper):
            # Another model may have compiled with it since.
            self.optimizer.microbatches = self.microbatches
        logs = self.train_step(data)
        if self.microbatches > 1 and not self._has_split:
            raise ValueError(
                "`microbatches` must be 1 for a model whose own `train_step` "
                "does not call tf_adascale.Model.train_step, which takes the "
                f"micro-batches. Received: microbatches={self.microbatches}, "
                f"model={self!r}"
            )
        return logs

    def make_test_function(self, force: bool = False) -> Any:
        """Returns the function of an iterator that takes the test steps."""
        if force or self.test_function is None:
            self.test_function = self._executor(self.test_step)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """Returns the function of a list of batches that predicts them."""
        jit_compile = self.jit_compile
        # Keras 3.10 compiles the replicas of a strategy as one XLA program,
        # which cannot reach the weights on other devices.
        self.jit_compile = jit_compile and self._distribute_strategy is None
        super().make_predict_function(force=force)
        self.jit_compile = jit_compile
        return self.predict_function

    def _executor(self, step):
        return executor.Executor(
            step,
            strategy=self.distribute_strategy,
            steps_per_execution=self.steps_per_execution,
            run_eagerly=self.run_eagerly,
        )

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Builds an unbuilt model from one replica's part of a batch."""
        strategy = self.distribute_strategy
        if self._distribute_strategy is None:
            return  # The first step builds it.
        if iterator is not None:
            *_, batches = next(iter(iterator))
            data_batch = executor.without_optionals(next(batches))
        with strategy.scope():
            self._symbolic_build(
                data_batch=executor.map_present(
                    lambda v: updates.local(strategy, v), data_batch
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

    Keras does the same to subclasses of `keras.Model`. Doing it to `Model`
    itself would break every subclass that has a `call`.
    """
    cls.__bases__ = tuple(
        FunctionalModel if base is Model else base for base in cls.__bases__
    )
    for base in cls.__bases__:
        if issubclass(base, Model) and not issubclass(base, Functional):
            _make_functional(base)

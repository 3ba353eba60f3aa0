"""Large-batch training for TensorFlow and Keras, without re-tuning."""

try:
    import tensorflow as _tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tf_adascale needs one of TensorFlow's builds, which exclude each "
        "other. Install the one for your hardware by the extra cpu, gpu or "
        'tpu of this package, in a clone by pip install ".[cpu]".'
    ) from error

import warnings as _warnings

from tf_adascale import callbacks, forecast, ops, schedules
from tf_adascale.ops import _keras
from tf_adascale.optimizers.adamscale import AdamScale
from tf_adascale.optimizers.adascale import AdaScale
from tf_adascale.optimizers.adasum import Adasum
from tf_adascale.training.model import Model
from tf_adascale.version import __version__

__all__ = [
    "AdaScale",
    "AdamScale",
    "Adasum",
    "Model",
    "__version__",
    "callbacks",
    "forecast",
    "ops",
    "schedules",
]

# Importing them made these attributes of the package. They are private.
for _name in ("distribute", "optimizers", "training", "version"):
    globals().pop(_name, None)

# An error would take the forecast too, which needs no backend.
try:
    _keras.check_backend()
except ValueError as _error:
    _warnings.warn(str(_error), stacklevel=2)

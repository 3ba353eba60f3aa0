"""Large-batch training for TensorFlow and Keras, without re-tuning."""

from tf_adascale import callbacks, ema, gain, norms, schedules
from tf_adascale.adascale import AdaScale
from tf_adascale.model import Model
from tf_adascale.version import __version__

__all__ = [
    "AdaScale",
    "Model",
    "__version__",
    "callbacks",
    "ema",
    "gain",
    "norms",
    "schedules",
]

"""Large-batch training for TensorFlow and Keras, without re-tuning."""

try:
    import tensorflow  # noqa: F401 (asked for here, to say what to install)
except ImportError as error:
    raise ImportError(
        "tf_adascale needs one of TensorFlow's builds, which exclude each "
        "other. Install the one for your hardware: pip install "
        '"tf_adascale[cpu]", "tf_adascale[gpu]" or "tf_adascale[tpu]".'
    ) from error

from tf_adascale import (
    adasum,
    callbacks,
    ema,
    forecast,
    gain,
    norms,
    schedules,
)
from tf_adascale.adascale import AdaScale
from tf_adascale.adasum_optimizer import Adasum
from tf_adascale.model import Model
from tf_adascale.version import __version__

__all__ = [
    "AdaScale",
    "Adasum",
    "Model",
    "__version__",
    "adasum",
    "callbacks",
    "ema",
    "forecast",
    "gain",
    "norms",
    "schedules",
]

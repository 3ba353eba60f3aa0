"""Keras callbacks that stop, log and checkpoint training."""

from tf_adascale.callbacks.checkpoint import Checkpoint
from tf_adascale.callbacks.progress import ScalingLog, StopAtScaleInvariantStep

__all__ = ["Checkpoint", "ScalingLog", "StopAtScaleInvariantStep"]

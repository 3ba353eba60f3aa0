"""The arithmetic of AdaScale and Adasum, as pure functions of tensors."""

from tf_adascale.ops import adasum, ema, gain, norms

__all__ = ["adasum", "ema", "gain", "norms"]

"""Checkpoints in LLaVA's original format, loaded straight into transformers' classes."""

from workers.hf.llava.config import is_original
from workers.hf.llava.loading import Original, load

__all__ = ["Original", "is_original", "load"]

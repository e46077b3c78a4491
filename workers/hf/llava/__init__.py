"""Checkpoints in LLaVA's original format, loaded straight into transformers' classes."""

from workers.hf.llava.loading import Original, load

__all__ = ["Original", "load"]

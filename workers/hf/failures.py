"""What torch and transformers raise, as the errors of the protocol."""

from __future__ import annotations

import traceback

import torch

from protocol.errors import EngineFailed, OutOfMemory, TandemError

# What the allocators of CUDA, of the CPU and of mps say; the type alone does not tell.
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def is_out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(exc, RuntimeError) and any(
        words in str(exc).lower() for words in _MEMORY_WORDS
    )


def is_fatal(exc: BaseException | None) -> bool:
    """Whether the accelerator's context is lost: every later request would fail as well."""
    return isinstance(exc, torch.AcceleratorError) and not is_out_of_memory(exc)


def as_typed(exc: Exception) -> TandemError:
    """The error of one generation that raised ``exc``, which becomes its cause."""
    error: TandemError
    if is_out_of_memory(exc):
        error = OutOfMemory("The worker ran out of memory while it computed this request.")
    else:
        error = EngineFailed(f"The model failed with {type(exc).__name__}.")
    # Frames hold the tensors of the failed pass for as long as the error lives.
    traceback.clear_frames(exc.__traceback__)
    error.__cause__ = exc.with_traceback(None)
    return error

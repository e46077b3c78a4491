"""The names SGLang imports from ``sgl_kernel`` on a CPU, so that its modules can be imported.

None of them runs: they belong to speculative decoding, which SGLang refuses with the only
attention backend there is here (``torch_native``), and to models with linear attention, whose
kernels are elsewhere. Everything a plain CPU server computes is PyTorch.

Only these names exist. SGLang asks for others to find out what the machine can do, and a wrong
"yes" breaks it; the worst is ``convert_weight_packed``, which means "has AMX".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

FUNCTIONS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
SUBMODULES = {"speculative": ("reconstruct_indices_from_tree_mask",)}
TORCH_OPS = (
    # bound when srt/models/qwen3_5.py is imported, which the Qwen-VL processors do
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)


def missing(name: str) -> Callable[..., NoReturn]:
    """A function of this name that says it is not there."""

    def stand_in(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel's {name} has no CPU build; the feature that needs it needs a GPU."
        )

    stand_in.__name__ = stand_in.__qualname__ = name
    return stand_in


def define_torch_ops() -> Any:
    """Declare ``TORCH_OPS`` without a body; the library object must be kept alive."""
    import torch

    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in TORCH_OPS:
        library.define(f"{name}() -> ()")
    return library

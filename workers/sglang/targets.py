"""The layers that SGLang adapts, by their last names in transformers' models."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that are one in SGLang: an adapter has all of such a group or none of it."""

TARGETS = (*FUSED[0], *FUSED[1], "o_proj", "down_proj")
"""The layers that are adapted; the server has room for adapters of these."""

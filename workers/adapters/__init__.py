"""LoRA adapters as files: which layers of a network one changes, and how.

Shared by the kinds that serve them, so that both take the same adapters and refuse the same.
"""

"""Checkpoints in LLaVA's original format: what they say, and what their texts and pictures become.

For every kind that serves them. ``images`` and ``weights`` need torch.
"""

"""Pocket LLaVA: the pictures it knows, the questions it answers, how it is trained and judged.

``scenes`` and ``questions`` draw a picture with known content and know the right answers; they need
Pillow alone, so that tests and benchmarks can ask questions whose truth they know.
"""

"""What runs inside SGLang's own processes, and all that touches its insides.

Nothing else in Tandem imports ``sglang`` or ``sgl_kernel``; the worker speaks HTTP to it.
"""

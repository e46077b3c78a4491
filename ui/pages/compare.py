from __future__ import annotations
class ComparePage:
    def __init__(self, parts, blocks): pass

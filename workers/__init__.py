"""Workers: one shell (server, membership, runner) around any engine.

The folder ``workers/sglang`` and the library ``sglang`` share a name: use absolute imports, and
never put this folder on ``sys.path``.
"""

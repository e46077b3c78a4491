"""The SGLang worker: the real SGLang server in a process of its own, spoken to over HTTP.

This folder and the library share a name: use absolute imports, and never put ``workers/`` on
``sys.path``.
"""

"""The controller: one process, without torch, that fronts every worker.

``app`` holds the routes, ``liveness`` and ``registry`` know who is alive, ``policy`` chooses,
``dispatch`` admits and places, ``proxy`` moves the bytes, ``generation`` is one request's life.
"""

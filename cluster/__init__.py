"""Starts a whole cluster on this machine and looks after it: ``python -m cluster up``.

``plan`` turns a cluster file into the processes to start, ``policy`` decides about restarts,
``child`` is one process, which ``tether`` ties to us, ``supervisor`` all of them, ``state`` the
run directory that ``status`` and ``down`` read, ``view`` the terminal.
"""

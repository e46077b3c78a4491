"""Soak test of the controller: ``python -m bench.soak``."""

"""What the SGLang worker costs, gains and must not change: ``python -m bench.sglang``."""

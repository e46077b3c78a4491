"""What the batch of the Hugging Face worker gains and must not change: ``python -m bench.hf``."""

"""The Hugging Face worker kind: any transformers model, one generation thread a request."""

"""The Hugging Face worker kind: any transformers model, its requests in one batch."""

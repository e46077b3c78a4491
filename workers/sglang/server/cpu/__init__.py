"""What SGLang needs where its kernel package cannot be loaded: on a machine without a GPU."""

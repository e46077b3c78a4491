"""OpenAI's wire: its requests as ours, our events as its answers."""

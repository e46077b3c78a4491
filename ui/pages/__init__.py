"""The three screens. Each is made of Gradio's components, and of HTML from ``render``."""

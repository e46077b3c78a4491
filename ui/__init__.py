"""The chat page: Gradio in front of the controller, and of nothing else.

``client`` and ``watch`` talk to the controller, ``jobs`` holds the answers that are being written,
``store`` what is kept, ``render`` makes HTML of it, ``pages`` are the three screens.
"""

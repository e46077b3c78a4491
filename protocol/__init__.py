"""The contract between clients, controller and workers: messages, events, errors, log fields.

It belongs to no process and needs nothing but pydantic, orjson and the standard library.
"""

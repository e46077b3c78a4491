"""HTTP plumbing that the controller and the workers share; knows the protocol and nothing else.

``client`` opens streams, ``asgi`` answers them, ``membership`` keeps a lease, ``tripwire`` notices
a peer's death, ``process`` parses settings and serves until a signal.
"""

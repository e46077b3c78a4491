"""The embedded model, and the package that makes it."""

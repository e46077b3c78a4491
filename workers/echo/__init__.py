"""The reference engine: no model, no torch; for tests and for measuring the controller."""

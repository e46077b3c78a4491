"""The version of Tandem, as processes tell it; ``pyproject.toml`` has the same."""

VERSION = "0.1.0"

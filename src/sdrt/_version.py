"""The version of sdrt, in the one place that pyproject.toml and bundles take it from."""

__version__ = "0.1.0"

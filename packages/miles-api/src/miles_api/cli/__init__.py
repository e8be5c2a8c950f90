"""The `miles` program."""

from miles_api.cli.main import main

__all__ = ["main"]

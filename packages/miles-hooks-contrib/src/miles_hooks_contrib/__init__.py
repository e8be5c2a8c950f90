from miles_hooks_contrib._version import __version__

__all__ = ["__version__"]

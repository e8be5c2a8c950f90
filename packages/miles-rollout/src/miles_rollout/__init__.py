from miles_rollout._version import __version__

__all__ = ["__version__"]

"""The HTTP router of Miles: one address for all inference engines, bytes in and bytes out.

The ASGI application is in `miles_router.app` and what serves it in `miles_router.server`: importing this package costs
no web server, since every `miles` command does.
"""

from ._version import __version__
from .options import RouterOptions
from .service import Router

__all__ = ["Router", "RouterOptions", "__version__"]

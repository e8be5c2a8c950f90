"""Middleware that ships with the router, one file each; none of it runs unless it is configured."""

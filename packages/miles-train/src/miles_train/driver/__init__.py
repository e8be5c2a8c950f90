"""The `miles train` driver: checks everything, starts the services, runs the loop. Alone in touching Ray."""

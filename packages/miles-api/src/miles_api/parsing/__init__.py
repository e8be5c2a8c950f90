"""From TOML files and a command line to a `RunConfig`."""

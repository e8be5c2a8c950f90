"""The actions of `miles hooks`, one file each: `NAME`, `HELP`, `configure(parser)` and `run(options) -> exit code`."""

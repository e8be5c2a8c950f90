"""How values lie in bytes: packed columns, lossless msgpack and JSON, checksummed frames."""

"""How new weights reach the engines: one file a path."""

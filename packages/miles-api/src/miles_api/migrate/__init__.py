"""Launch scripts of Miles 0.x and slime turned into a run file: `miles migrate`.

`script` reads a shell script without running it and finds the flags of its `train.py`; `table` says what became of
each flag; `translate` applies it to the options of the installed packages; `write` makes the TOML.
"""

from miles_api.migrate.script import Script, read_script
from miles_api.migrate.translate import Migration, migrate
from miles_api.migrate.write import to_toml

__all__ = ["Migration", "Script", "migrate", "read_script", "to_toml"]

"""Where `code_execution` runs programs that a model wrote: see docs/contrib/code_execution.md.

`session` is the near side. All other modules are the far side as well: they import the standard library alone.
"""

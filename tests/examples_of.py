"""Import the files of examples under names of their own: several are called reward.py."""

import importlib.util


def load(path):
    """Return the module at `path`."""
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

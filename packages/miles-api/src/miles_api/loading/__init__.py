"""From a reference to a hook that can be called: import, fit to the stub, negotiate versions, bind, report."""

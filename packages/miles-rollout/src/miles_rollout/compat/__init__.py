"""What hooks written for Miles 0.x and slime import and that needs this package: the entry points `miles.compat`."""

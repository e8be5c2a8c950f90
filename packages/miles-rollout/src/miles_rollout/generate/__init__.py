"""Generate hooks: one file each."""

"""What can be known to be wrong before a run starts, and the plan that is shown."""

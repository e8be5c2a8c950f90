"""What a person sees of a run: progress while it goes, metrics elsewhere, and a report afterwards.

Nothing is imported here: `python -m miles_train.view.report` and the driver each load only what they use.
"""

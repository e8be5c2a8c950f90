"""SGLang as the inference engine: launched and supervised here, or running already and attached to.

Nothing here imports SGLang. Its pins often clash with the trainer's, so it may live in an environment of its own
(`--sglang-python`), and is spoken to by command line and HTTP alone.
"""

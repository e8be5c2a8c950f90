"""SGLang on a machine without a GPU: an environment of its own, made by `miles sglang-cpu`."""

"""The local engine: continuous batching on CPU threads, behind SGLang's native HTTP protocol.

`python -m miles_rollout.engines.local --model-path DIR --port N` serves one model; `fleet.LocalFleet` starts several.
"""

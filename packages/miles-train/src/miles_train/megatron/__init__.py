"""The only modules that import Megatron-Core: process groups, model, forward and backward, optimizer, checkpoints."""

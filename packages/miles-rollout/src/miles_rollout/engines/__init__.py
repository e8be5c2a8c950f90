"""Inference engines: servers that speak SGLang's native HTTP protocol, and the fleets that start them."""

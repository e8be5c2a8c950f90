"""Stands in for SGLang, which is too large for these tests: the same command line, and a few of its endpoints."""

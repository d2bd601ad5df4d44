"""Backends of the operator: the same `decode` signature, one module each."""

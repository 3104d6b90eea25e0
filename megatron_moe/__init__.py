"""Mixture-of-experts training on Megatron-Core that anyone can run, understand and trust."""

__version__ = "0.1.0"

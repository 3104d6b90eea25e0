"""Generation, scoring and evaluation of trained checkpoints, under any parallel layout.

From Python: `megatron_moe.inference.model.load_for_inference`. Nothing is imported here, so that the options, which
need no torch, load at once.
"""

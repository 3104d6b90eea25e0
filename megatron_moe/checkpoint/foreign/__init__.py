"""Checkpoints of other programs, read into ours: PAI's GPT-MoE, Megatron-DeepSpeed's, Megatron-LM's.

Each format is a function that takes a folder and gives a `ForeignModel`: flags, weights and where they belong.
"""

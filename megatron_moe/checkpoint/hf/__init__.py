"""Hugging Face checkpoints: which class holds a model, and the way there and back."""

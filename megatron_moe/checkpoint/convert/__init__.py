"""Moves weights between formats: what belongs where (`blocks.py`), read and written a tensor at a time."""

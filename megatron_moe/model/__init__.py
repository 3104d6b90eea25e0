"""The GPT of a run: layer specs, attention, initial weights, parameter counts."""

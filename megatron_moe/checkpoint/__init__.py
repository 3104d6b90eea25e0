"""Save, load and reshard a run's state."""

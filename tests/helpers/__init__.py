"""What tests share: ranks, tiny runs and their data."""

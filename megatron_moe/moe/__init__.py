"""Experts: which layer has how many, how tokens reach them, and what they did."""

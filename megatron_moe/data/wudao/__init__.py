"""Cleaning of WuDao-shaped web text: readers, rules composed by recipes, and the run that applies them at scale."""

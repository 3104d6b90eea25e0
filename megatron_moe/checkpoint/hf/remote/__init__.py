"""The model class that is copied into an exported folder where no class of transformers computes what ours does."""

"""Text to training batches: documents, tokenizers, token files, datasets (only the last needs torch)."""

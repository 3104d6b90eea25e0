"""One file for each family of Hugging Face models: its config, and where its weights are in ours."""

"""Tokenizers: training a SentencePiece model on Chinese text (`build`) and loading any kind (`load`)."""

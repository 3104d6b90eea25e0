"""The kinds of tokenizers that the package can work with, one a file, all behind `protocol.Tokenizer`."""

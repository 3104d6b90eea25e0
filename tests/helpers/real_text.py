"""Real text that every Python brings along: its language reference, in `pydoc_data.topics`.

Half a megabyte of English prose and code, which `help("topics")` prints.
"""

from pathlib import Path
from pydoc_data.topics import topics

from tests.helpers.tiny import write_data

VOCABULARY = 1000


def write_real_data(folder: Path) -> Path:
    """Write a tokenizer and token files; one document per topic, in order of names, every tenth held out."""
    documents = [topics[name] for name in sorted(topics)]
    texts = {"train": [text for place, text in enumerate(documents) if place % 10], "valid": documents[::10]}
    return write_data(folder, texts, VOCABULARY)

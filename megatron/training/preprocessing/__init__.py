"""From text corpora to token files, and from corpora to vocabularies."""

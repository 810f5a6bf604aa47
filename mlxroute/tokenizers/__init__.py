"""Tokenizers: chat templates, token vocabularies and the bytes of vocabulary pieces."""

"""Finding and loading models and tokenizers."""

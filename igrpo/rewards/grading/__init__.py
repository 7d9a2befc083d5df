"""Whether an answer is right: found in the text, read, and compared."""

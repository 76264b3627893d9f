"""What is read: documents, their split, blocks of tokens, conversations."""

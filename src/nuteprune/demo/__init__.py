"""The embedded default: a small model and text that need no hub."""

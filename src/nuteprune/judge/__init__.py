"""Is it good, is it fast: perplexity, zero-shot tasks, speed, the report."""

"""How good and how fast a model is: perplexity, zero-shot tasks, speed."""

"""What is removed: gates, masks, scores, the parameter budget, the sparsity schedule."""

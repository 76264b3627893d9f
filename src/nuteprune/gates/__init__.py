"""What is removed: masks, scores, the parameter budget, and the knapsack that chooses."""

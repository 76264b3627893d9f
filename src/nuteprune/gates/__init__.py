"""What is learned: gates, their masks, their budget, and when how much is to be removed."""

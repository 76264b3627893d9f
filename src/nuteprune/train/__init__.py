"""Training: the data it reads, the schedule it follows, the loop that runs it."""

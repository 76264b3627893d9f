"""The recipe: write the text, cut by it, slice, judge."""

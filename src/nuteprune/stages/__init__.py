"""The recipe, a module for each stage: write, score, choose, refit, slice, judge, save."""

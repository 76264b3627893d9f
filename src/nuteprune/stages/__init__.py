"""The recipe, a module for each stage: write, score, price, choose, refit, slice, judge, save."""

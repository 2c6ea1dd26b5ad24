"""Sampling completions with PyTorch, and scoring them: the fast paths, each checked on the model itself."""

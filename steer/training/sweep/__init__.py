"""Many independent sets of vectors trained at once on one frozen model."""

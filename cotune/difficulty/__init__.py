"""Compute by difficulty: which inference plan answers which question best, at equal generations."""

"""Inspection of data before training: problems, sizes and training locations."""

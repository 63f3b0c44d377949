"""What can be known about data before training: all problems, sizes, training locations."""

"""What needs whole rows of similarities, some rows at a time: top-k, statistics of a softmax, a histogram."""

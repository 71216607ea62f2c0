"""The streaming log-sum-exp: similarities in tiles, alone and among the rows of all processes."""

"""Speed and memory of the losses and of k-means against their rivals: ``python -m benchmarks cpu | memory | gpu``."""

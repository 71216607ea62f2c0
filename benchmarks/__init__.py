"""Speed and memory of the losses against their rivals: ``python -m benchmarks cpu | memory | gpu``."""

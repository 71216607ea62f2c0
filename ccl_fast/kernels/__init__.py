"""Triton kernels and the table of their launch configurations; imported only where Triton is."""

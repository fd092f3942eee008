"""Triton kernels, one operation per file; this file enters them in the registry without importing Triton."""

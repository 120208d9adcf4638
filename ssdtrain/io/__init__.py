"""Bytes, files and requests: engines, which try again and report what failed, and spill files. Knows no tensors."""

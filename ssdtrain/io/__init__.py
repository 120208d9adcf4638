"""Bytes, files and requests: engines, spill files, room in them, and who has a share of it. Knows no tensors."""

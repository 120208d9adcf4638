"""One record for each range of bytes that leaves memory, and what writes and reads it. Knows storages, not reasons."""

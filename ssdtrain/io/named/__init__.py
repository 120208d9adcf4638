"""Files that others know, read and written in place. Knows ranges, memory of any kind and requests; no spill files."""

"""Records and what moves them. Knows storages and extents; not who saved them, nor why."""

"""What is known of a saved tensor: its storage, its class, its module, and whether it was chosen. Knows no bytes."""

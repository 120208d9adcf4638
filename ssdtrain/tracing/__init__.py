"""What one step did, by the host's clock and by an accelerator's. Knows times and sizes; moves and decides nothing."""

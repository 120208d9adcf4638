"""What one step did, by the host's clock and by an accelerator's. Moves nothing and decides nothing."""

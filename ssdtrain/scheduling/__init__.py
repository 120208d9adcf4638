"""What stays in memory, what is reloaded next, when to plan anew. Knows records and clocks; moves nothing."""

"""What stays, what comes back next, when to plan anew. Decides, and moves nothing."""

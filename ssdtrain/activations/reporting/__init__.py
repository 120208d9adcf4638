"""What users are told while training runs: finished steps, and why nothing was offloaded. Knows no bytes."""

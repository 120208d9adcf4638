"""What adapters of several trainers are made of. Knows how trainers call, and imports none of them."""

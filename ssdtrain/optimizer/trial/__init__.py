"""Whether an optimizer can be offloaded, found out before anything changes. Knows optimizers; moves nothing."""

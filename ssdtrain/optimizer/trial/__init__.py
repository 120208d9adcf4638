"""Whether an optimizer can be offloaded, found out before anything is written or changed. Moves nothing."""

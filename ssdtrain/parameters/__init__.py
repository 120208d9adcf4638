"""Parameters on the drive, in memory only while their block is used. Knows modules; not how an optimizer steps."""

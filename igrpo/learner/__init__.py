"""From scored groups to an updated policy."""

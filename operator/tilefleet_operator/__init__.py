"""tilefleet operator."""

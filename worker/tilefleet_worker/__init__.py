"""tilefleet worker."""

"""Learning from what annotators confirmed and rejected."""

"""Many prompts, of any length and number, a few at a time."""

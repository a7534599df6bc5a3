"""What layers of all kinds share: classes, weights, and the call under way."""

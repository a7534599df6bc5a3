"""What an entry of the cache is, and what all layers that have one share."""

"""How upstream's decoder blocks are called, looked into, and shared."""

"""What a user may say of one generation, beyond how long it may become."""

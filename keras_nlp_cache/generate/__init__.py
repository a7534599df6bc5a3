"""The task, and all ways to have it generate."""

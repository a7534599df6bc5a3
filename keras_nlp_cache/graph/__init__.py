"""How a cache is threaded through a functional graph, and what it is then."""

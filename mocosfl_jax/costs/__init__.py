"""Computation, memory and traffic of each client and of the server, counted from shapes."""

"""More than one machine: the service on Ray Serve."""

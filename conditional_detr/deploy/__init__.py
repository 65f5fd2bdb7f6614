"""Models made ready to run: optimised in memory."""

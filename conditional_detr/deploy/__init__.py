"""Models made ready to run: optimised in memory, or as files for other runtimes."""

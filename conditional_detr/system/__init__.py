"""Write files atomically, handle shutdown requests and show progress bars; nothing here needs torch."""

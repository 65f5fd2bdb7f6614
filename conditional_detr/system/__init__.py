"""Files written atomically, shutdown requests, progress bars; nothing here needs torch."""

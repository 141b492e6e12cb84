"""What a request has built: its texts, its names, and what goes into it."""

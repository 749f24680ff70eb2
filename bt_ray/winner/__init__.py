"""What a sweep leaves: the best program, opened, served and exported."""

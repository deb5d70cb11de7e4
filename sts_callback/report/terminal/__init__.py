"""Records as text that fits a terminal."""

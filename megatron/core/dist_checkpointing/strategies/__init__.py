"""How pieces are stored, by whom, and when."""

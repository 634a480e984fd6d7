"""What operators ask of the tables as a whole, and what keeps them small, safe and readable."""

"""What the puller goes by: how much is wanted, from where to look, whom to leave alone."""

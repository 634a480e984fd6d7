"""How events become leased tasks: what is read, what is due, whose turn it is, who holds it."""

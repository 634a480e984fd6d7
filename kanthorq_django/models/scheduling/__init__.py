"""What a schedule is made of: how it is written, when it occurs, how far it has come."""

"""A small shop that shows what the app is for."""

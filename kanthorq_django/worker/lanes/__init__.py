"""Where handlers run: threads and an event loop, and what waits to be started in them."""

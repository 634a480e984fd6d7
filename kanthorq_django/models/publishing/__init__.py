"""How events get into a stream: checked, encoded, encrypted, inserted, and announced."""

"""Business rows that tests write beside an acknowledgement."""

"""One folder per contestant.

``peer.py`` says how its worker is started and is imported by the harness; ``adapter.py`` and what
else is there run in the contestant's own virtual environment. ``requirements.txt`` pins that.
"""

"""The worker: it pulls and claims tasks, runs their handlers and settles them.

loop.py is one process and wires the others; supervisor.py keeps several of them. What the loop's
parts are made of stands in folders: pulling, lanes and connections.
"""

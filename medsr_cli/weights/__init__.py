"""Checkpoints: the list of them, where they lie on this machine, how they get there and what proves them whole.

Nothing here imports PyTorch, and only `fetch` may open a socket.
"""

"""Checkpoints: the list of them, where they lie on this machine, how they get there and what proves them whole.

Nothing here imports PyTorch before a checkpoint is pushed, and `fetch` alone opens sockets: `download`, `send` and
`hub` go through it.
"""

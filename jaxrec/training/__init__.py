"""Training: mesh and sharding rules, optimiser, checkpoints, loop, stages; independent of systems and data."""

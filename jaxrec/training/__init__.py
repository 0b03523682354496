"""Training: the mesh and its rules, the optimiser, checkpoints, the loop. It knows no system and no data."""

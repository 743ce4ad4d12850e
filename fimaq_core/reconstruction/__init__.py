"""Block reconstruction: the tape of block inputs, the objective, the optimisation and the walk over blocks."""

"""Block reconstruction: tape of block inputs, objective, optimisation, walk over the blocks."""

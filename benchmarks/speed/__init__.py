"""How fast the harness is: plain slow forms of its own computations, to be timed beside the fast ones."""

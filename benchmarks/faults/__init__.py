"""Fault bench: a grid whose processes are killed must give the same results as without kills."""

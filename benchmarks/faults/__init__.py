"""Fault bench: a grid whose processes are killed must give the results of an undisturbed grid."""

"""Rehearsal of a grid: each cell runs completely, with random weights, few images and few steps.

A rehearsal shows that the code runs on this machine with the real models, before days of GPU time
are spent. It estimates seconds, memory and disk of the real run.
"""

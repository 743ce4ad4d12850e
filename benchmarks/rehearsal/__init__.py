"""Rehearsal of a grid: each cell from end to end in small, with random weights and images.

It shows that the code runs on this machine at the real model sizes before days of GPU time are
spent, and it estimates seconds, memory and disk of the real run.
"""

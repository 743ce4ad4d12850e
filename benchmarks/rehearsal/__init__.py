"""Rehearsal: the cells of a grid end to end in small, with random weights of the real architectures.

It shows before days of GPU time are spent that the code runs on this machine at the real sizes, and
estimates seconds, memory and disk of the real run.
"""

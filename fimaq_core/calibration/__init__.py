"""Ranges: the search of scales and zero points before any reconstruction.

Names and shapes in this package: ``levels`` is the number L of grid points, ``count`` that of
candidates. A weight is a matrix (rows, d) with one row per output channel, a linear layer's inputs
are (tokens, d), attention operands (batch, heads, rows, inner) and (batch, heads, inner, columns).
``hat`` stands for the quantized form. Candidate scales and zero points are (candidates,
groups).
"""

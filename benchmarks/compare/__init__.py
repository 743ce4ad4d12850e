"""Comparing two runs on the samples both were measured on: paired tests, intervals and effect sizes."""

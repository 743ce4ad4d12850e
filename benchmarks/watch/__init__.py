"""Watching a run: its events, the view in its terminal, and the command ``status``."""

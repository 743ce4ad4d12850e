"""Models: their weight files, the hub, and facts about checkpoints."""

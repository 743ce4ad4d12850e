"""Fisher information of a block's output: divergences, passes that estimate it, and losses."""

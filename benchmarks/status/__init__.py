"""What runs on a results folder: the files that runners write about themselves, and the command that shows them."""

"""What happens to a grid when processes are killed, and whether many workers stay busy."""

"""Running the cells of a grid: what runs next, where it runs, and what follows when it fails."""

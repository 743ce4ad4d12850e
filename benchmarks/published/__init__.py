"""Numbers that papers report, and their tables: which cells a table has and how it is laid out."""

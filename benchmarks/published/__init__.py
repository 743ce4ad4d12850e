"""Published numbers and tables: their CSV and YAML files, and how these are read."""

"""Where cells run: on this machine, or on the machines of a Ray cluster. The runner decides what runs next."""

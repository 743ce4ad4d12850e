"""Speed of the stages and step engines beside the limits of the machine."""

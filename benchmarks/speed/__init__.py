"""Speed of the stages and step engines, compared with the limits of the machine."""

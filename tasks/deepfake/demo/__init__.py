"""Demo: a small detector of tampered patches in scenes of digits."""

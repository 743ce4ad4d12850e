"""Demo of the detection task without any download: scenes of digits and two tiny detectors."""

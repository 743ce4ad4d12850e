"""Demo of the retrieval task without any download: captioned scenes of digits and a tiny CLIP."""

"""Detection of tampered faces: frames and videos in DeepfakeBench's layout."""

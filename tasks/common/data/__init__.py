"""Images: read, ordered by class, augmented, chosen for calibration."""

"""Images: reading, order of classes, augmentation, calibration samples."""

"""Data sets: loading them, reading their images, labels and masks, and augmentation."""

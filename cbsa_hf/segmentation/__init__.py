"""
From a photo to its segments.

The files of this folder import only each other, not the rest of the package: Transformers uploads them beside a saved
pipeline, to be run where this package is not installed. `sliding_window` may import more, since no pipeline needs it.
"""

"""Models of Transformers for detection, captions and depth, on a CBSA encoder."""

"""The EfficientNet family."""

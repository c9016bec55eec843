"""cl-moe: continual learning with growing experts. Importing this package imports nothing heavy."""

__version__ = "0.1.0"

"""Loading and running models: exactly the files that are copied into a Hub repository beside a published model.

The copies lie flat beside each other, so that these import each other by `from .name import x` only, and nothing else
of the package outside of a method. They need torch and transformers alone.
"""

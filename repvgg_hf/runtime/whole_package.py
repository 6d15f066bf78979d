"""What a model can do only where the whole package is installed, and not from the code beside a checkpoint alone."""


def import_compression(caller: str):
    """Return the package's `compression`; raises `ImportError` saying that `caller` needs it if it is not installed."""
    try:
        import repvgg_hf.compression as compression
    except ImportError as error:
        raise ImportError(f"{caller} is part of the package: `pip install repvgg-hf`.") from error
    return compression


__all__ = ["import_compression"]

"""Warnings that heed the verbosity set for Transformers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> logging.Logger:
    """Return the logger called `name`, which says no more than `transformers.logging.set_verbosity` lets through.

    It is not below Transformers' own logger, whose messages begin with "[transformers]" and don't propagate.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_is_wanted)
    return logger


@contextmanager
def quiet(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Keep back what the logger called `name`, of another library, has to say below a `level` in a `with` block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= transformers_logging.get_verbosity()


__all__ = ["get_logger", "quiet"]

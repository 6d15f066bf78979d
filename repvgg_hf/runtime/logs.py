"""Warnings that heed the verbosity set for Transformers."""

import logging

from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> logging.Logger:
    """Return the logger called `name`, which says no more than `transformers.logging.set_verbosity` lets through.

    It is not below Transformers' own logger, whose messages begin with "[transformers]" and don't propagate.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_is_wanted)
    return logger


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= transformers_logging.get_verbosity()


__all__ = ["get_logger"]

"""The engine's version, part of every provenance."""

__version__ = "0.1.0"

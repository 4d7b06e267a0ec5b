"""The machine behind tsproxy.py: a TCP proxy that lets no TCP timestamp out, and proves it."""

__version__ = "0.1.0"

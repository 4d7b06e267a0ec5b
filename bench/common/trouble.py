"""The two ways in which a benchmark does not go as planned."""

from __future__ import annotations


class Refusal(Exception):
    """Nothing can be measured; the text says what to do. The program ends with 2."""


class Failed(Exception):
    """One measurement could not be made; the others go on."""

"""malote seals mail on its way out and opens it, checked for freshness, on its way in."""

__version__ = "0.1.0"

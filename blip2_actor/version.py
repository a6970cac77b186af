"""The version, written here and nowhere else; builds read it without importing the package."""

__version__ = "0.1.0"

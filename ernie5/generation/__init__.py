"""Decoding of every modality from any mix of prompts."""

from ernie5.generation.api import generate
from ernie5.generation.load import load_run

__all__ = ["generate", "load_run"]

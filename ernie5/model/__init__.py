"""The single-device model: one backbone for every modality, and its heads and losses."""

from ernie5 import environment
from ernie5.model.configuration import Ernie5Config
from ernie5.model.modeling import Ernie5ForCausalLM

environment.use_cores()

__all__ = ["Ernie5Config", "Ernie5ForCausalLM"]

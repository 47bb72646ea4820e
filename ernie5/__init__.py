"""ERNIE 5.0 in PaddlePaddle: one autoregressive model over text, images, video and audio."""

from ernie5 import environment

environment.prepare()

__version__ = "0.1.0"

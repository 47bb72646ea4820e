"""Parallelism, applied to the single-device model from outside; the only room that talks to ``paddle.distributed``."""

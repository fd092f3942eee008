"""Closed sets of names shared by all layers."""

from __future__ import annotations

import enum


class ModelType(enum.Enum):
    """How a model uses the pipeline: one stack of layers, or an encoder feeding a decoder."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
    retro_encoder = 3
    retro_decoder = 4

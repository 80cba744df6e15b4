"""What a model does with a text: selection, step sizes, memory, loss by position."""

from anymamba.runtime.analysis.inspection import Inspection, inspect
from anymamba.runtime.analysis.layerwise import Layer, normed
from anymamba.runtime.analysis.losses_by_position import Stretch, helpful_context, loss_by_position

__all__ = [
    "Inspection",
    "Layer",
    "Stretch",
    "helpful_context",
    "inspect",
    "loss_by_position",
    "normed",
]

"""Models from one form on disk to another: layouts, GGUF, 8 and 4 bits, adapters merged."""

from anymamba.renamed import old_names
from anymamba.runtime.convert.calibration import Recipe, calibrate, windows_of
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.convert.merging import merge
from anymamba.runtime.convert.quantizing import quantize_checkpoint

__all__ = ["Recipe", "calibrate", "convert", "merge", "quantize_checkpoint", "windows_of"]

__getattr__ = old_names(__name__)

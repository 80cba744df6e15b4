"""`from_pretrained`: finding, reading and checking weights in every layout and format."""

from anymamba.modeling.loading.loading import FromAnyLayout

__all__ = ["FromAnyLayout"]

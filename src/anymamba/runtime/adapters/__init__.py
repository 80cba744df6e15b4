"""LoRA adapters: reading them and merging them into weights."""

from anymamba.runtime.adapters.adapter_file import Adapter, base_model_of, read_adapter
from anymamba.runtime.adapters.merging import check_fits, merge_adapter, merged

__all__ = ["Adapter", "base_model_of", "check_fits", "merge_adapter", "merged", "read_adapter"]

"""Loading what `anymamba generate` needs: a tokenizer, and a model on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anymamba.errors import BackendError, CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from anymamba import MambaForCausalLM

__all__ = ["load_model", "load_tokenizer"]


def load_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer in a file or folder, in the format of the `tokenizers` library."""
    from tokenizers import Tokenizer

    path = place / "tokenizer.json" if place.is_dir() else place
    if not path.is_file():
        raise CheckpointError(
            f"there is no tokenizer: {path} is missing. Name another folder with --tokenizer "
            "(the state-spaces/mamba models use the tokenizer of EleutherAI/gpt-neox-20b)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is no tokenizer that can be read: {error}") from None


def load_model(folder: Path, device_name: str, dtype: str) -> MambaForCausalLM:
    """The model, on the device and in the type asked for, ready to generate."""
    from anymamba import MambaForCausalLM

    device = find_device(device_name)
    if dtype == "auto" and device.type == "cpu":
        # Few CPUs have fast arithmetic in the narrow types that models are stored in.
        dtype = "float32"
    with without_progress_bars():
        model = MambaForCausalLM.from_pretrained(folder, dtype=dtype)
    # Transformers hides the type of this method from type checkers.
    cast(Any, model).to(device)
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep Transformers from drawing on standard error, which belongs to errors and figures."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def find_device(name: str) -> torch.device:
    """The PyTorch device of that name, or an error that says why there is none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: {error}") from None
    try:
        torch.zeros(1, device=device).tolist()
    # PyTorch reports a device it was not built for by an AssertionError or NotImplementedError.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise BackendError(f"--device {name} cannot be used here: {error}") from None
    return device

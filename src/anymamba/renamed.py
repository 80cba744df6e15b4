"""Names of release 0.1 that have others now. They go on working for one release, with a warning.

`import anymamba` only notes where to look: this table is read once someone imports an old module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MODULES", "NAMES", "find_renamed", "old_names", "warn_renamed"]

_PACKAGE = __file__.removesuffix("renamed.py")

# Modules that moved under the names they had: from where, to where, and which.
_MOVED = (
    ("cli", "cli.commands", "completion run"),
    ("cli", "cli.commands.evaluation", "bench evaluate lambada score"),
    ("cli", "cli.commands.models", "convert download info merge models quantize"),
    ("cli", "cli.commands.text", "generate ingest inspect"),
    ("cli", "cli.commands.training", "finetune train"),
    ("cli", "cli.terminal", "output progress sizes table"),
    ("cli", "cli.text", "passages prompt prompt_lines"),
    ("dropin", "dropin.common", "borrowed gradients rows sampling"),
    ("modeling", "modeling.generation", "logits_processors multinomial"),
    ("modeling", "modeling.mamba", "causal_lm mixer model outputs"),
    ("modeling", "modeling.packing", "kept_positions padding"),
    ("runtime", "checkpoint", "finite quantization"),
    ("runtime", "runtime.analysis", "inspection layerwise"),
    ("runtime", "runtime.convert", "calibration layouts"),
    ("runtime", "runtime.generation", "sampling sampling_settings"),
    ("training", "training.data", "instructions packing tokenizers"),
    ("training", "training.lifecycle", "progress report"),
    ("training", "training.pretrain", "arguments dropout run trainer validation"),
)
MODULES = {
    f"{old}.{name}": f"{new}.{name}" for old, new, names in _MOVED for name in names.split()
} | {
    "checkpoint.digest": "checkpoint.fingerprint",
    "checkpoint.json_object": "checkpoint.io.text",
    "checkpoint.names": "checkpoint.architecture",
    "checkpoint.paths": "checkpoint.io.paths",
    "checkpoint.quantized": "checkpoint.quantized_folder",
    "checkpoint.reading": "checkpoint.checkpoint",
    "checkpoint.safetensors_header": "checkpoint.safetensors.header",
    "checkpoint.safetensors_stream": "checkpoint.safetensors.writer",
    "checkpoint.safetensors_writing": "checkpoint.safetensors.writer",
    "checkpoint.wording": "checkpoint.io.messages",
    "checkpoint.writing": "checkpoint.io.atomic_file",
    "cli.about_gguf": "cli.describe.gguf",
    "cli.about_machine": "cli.describe.machine",
    "cli.about_model": "cli.describe.model",
    "cli.about_state": "cli.describe.state",
    "cli.chat_input": "cli.chat.input",
    "cli.chat.template": "runtime.chat.model_template",
    "cli.chat_template": "runtime.chat.model_template",
    "cli.continuation": "cli.summary",
    "cli.conversation": "cli.chat.conversation",
    "cli.figures": "cli.summary",
    "cli.inspected": "cli.inspection.result",
    "cli.inspection_figure": "cli.inspection.figure",
    "cli.inspection_page": "cli.inspection.page",
    "cli.known_models": "cli.describe.known_models",
    "cli.model_options": "cli.options.model",
    "cli.opening": "cli.load_engine",
    "cli.pictures": "cli.terminal.plot_file",
    "cli.quiet": "cli.terminal.silence",
    "cli.sampling_options": "cli.options.sampling",
    "cli.text_files": "cli.text.files",
    "cli.tokens_of_blocks": "cli.text.streaming_tokenizer",
    "cli.values": "cli.options.argument_types",
    "cli.waiting_threads": "cli.openmp",
    "dropin.layer_sizes": "dropin.common.layers",
    "dropin.layer_states": "dropin.common.layers",
    "dropin.rotary": "dropin.mamba_ssm.modules.mha",
    "modeling.finding": "modeling.loading.find",
    "modeling.layer_state": "modeling.state",
    "modeling.loading_arguments": "modeling.loading.arguments",
    "modeling.loading_quantized": "modeling.loading.quantized",
    "modeling.tensor_names": "modeling.loading.tensor_names",
    "ops.conv_cuda": "ops.conv.mamba_ssm",
    "ops.conv_native": "ops.conv.native",
    "ops.conv_reference": "ops.conv.reference",
    "ops.cuda_limits": "ops.mamba_ssm_limits",
    "ops.linear_native": "ops.linear.native",
    "ops.linear_reference": "ops.linear.reference",
    "ops.norm_native": "ops.norm.native",
    "ops.norm_reference": "ops.norm.reference",
    "ops.plain": "ops.fusable",
    "ops.quantized_linear_native": "ops.quantized_linear.native",
    "ops.quantized_linear_reference": "ops.quantized_linear.reference",
    "ops.scan_cuda": "ops.scan.mamba_ssm",
    "ops.scan_mambapy": "ops.scan.mambapy",
    "ops.scan_native": "ops.scan.native",
    "ops.scan_reference": "ops.scan.reference",
    "ops.ssd_blocked": "ops.ssd.chunked",
    "ops.ssd_operator": "ops.ssd.chunked",
    "ops.ssd_reference": "ops.ssd.reference",
    "originals": "upstream",
    "runtime.adapter": "runtime.adapters.merging",
    "runtime.adapter_reading": "runtime.adapters.adapter_file",
    "runtime.bfloat16": "checkpoint.dtypes",
    "runtime.blocks": "runtime.state.batch_state",
    "runtime.chat_rendering": "runtime.chat.rendering",
    "runtime.chat_template": "runtime.chat.template",
    "runtime.folder_writing": "checkpoint.atomic_folder",
    "runtime.gguf_blocks": "checkpoint.gguf.blocks",
    "runtime.gguf_files": "checkpoint.gguf.files",
    "runtime.gguf_header": "checkpoint.gguf.header",
    "runtime.gguf_names": "checkpoint.gguf.names",
    "runtime.gguf_parts": "checkpoint.gguf.parts",
    "runtime.gguf_reading": "checkpoint.gguf.reader",
    "runtime.gguf_tokenizer": "checkpoint.gguf.tokenizer",
    "runtime.gguf_weights": "runtime.weights.gguf",
    "runtime.gguf_writing": "checkpoint.gguf.writer",
    "runtime.identity": "runtime.state.state",
    "runtime.kinds": "runtime.weights.weight_types",
    "runtime.mapping": "checkpoint.safetensors.mmap",
    "runtime.merge": "runtime.convert.merging",
    "runtime.positions": "runtime.analysis.losses_by_position",
    "runtime.processors": "runtime.generation.logits_processors",
    "runtime.quantize_checkpoint": "runtime.convert.quantizing",
    "runtime.reading": "runtime.prefill",
    "runtime.sources": "checkpoint.source",
    "runtime.streaming": "runtime.generation.detokenizer",
    "runtime.suggested_sampling": "runtime.generation.sampling_settings",
    "runtime.tokenizer_limits": "checkpoint.tokenizer",
    "torch_gguf": "modeling.gguf",
    "training.finetune_checkpoints": "training.finetune.checkpoints",
    "training.finetune_trainer": "training.finetune.trainer",
    "training.opening": "training.load_trainable",
    "training.resuming": "training.lifecycle.resume",
    "training.safety": "training.lifecycle.atomic_checkpoints",
}
"""Old modules and what they are called now, both without `anymamba.` in front."""

NAMES = {
    "dropin.common.layers": {
        "at_least_float32": "layers.initialization:at_least_float32",
        "convolve": "layers.convolution:convolve",
        "convolve_step": "layers.convolution:convolve_step",
        "last_inputs": "layers.convolution:last_inputs",
        "step_bias": "layers.initialization:draw_step_bias",
    },
    "checkpoint.gguf.names": {"is_matrix": "checkpoint.architecture:is_matrix"},
    "checkpoint.safetensors.writer": {"Planned": "checkpoint.safetensors.writer:TensorPlan"},
    "modeling.cache": {"config_of": "modeling.state:config_of"},
    "modeling.config": {"INIT_SCHEMES": "modeling.config_checks:INIT_SCHEMES"},
    "modeling.packing": {"PackedBatch": "modeling.packing.packing:PackedBatch"},
    "runtime.analysis.layerwise": {"check_computable": "runtime.native:epsilon_of"},
    "ops.fusable": {"why_not_plain": "ops.fusable:why_not_fusable"},
    "ops.mamba_ssm_limits": {"reason_against": "ops.mamba_ssm_limits:unsupported_reason"},
    "ops.native": {
        "reason_against": "ops.native:unsupported_reason",
        "yields": "ops.native:prefers_other",
    },
    "ops.quantized_linear.reference": {"widened": "ops.quantized_linear.reference:dequantize"},
    "ops.ssd.chunked": {
        "Gradients": "ops.ssd.gradients:Gradients",
        "ssd_blocked": "ops.ssd.chunked:ssd",
    },
    "runtime.network": {"STRETCH_TOKENS": "runtime.network:CHUNK_TOKENS"},
    "runtime.convert": {
        "FOLDER_WEIGHTS": "runtime.convert.conversion:FOLDER_WEIGHTS",
        "LAYOUTS": "runtime.convert.conversion:LAYOUTS",
        "write_files": "runtime.convert.conversion:write_files",
    },
    "runtime.generation": {
        "Generation": "runtime.generation:GenerationOutput",
        "Piece": "runtime.generation:TokenOutput",
        "StoppedBy": "runtime.generation.token_generator:FinishReason",
        "Writer": "runtime.generation:TokenGenerator",
    },
    "runtime.generation.detokenizer": {"TextStream": "runtime.generation:StreamingDetokenizer"},
    "runtime.state.batch_state": {"Blocks": "runtime.state:BatchState"},
    "runtime.weights.weight_types": {
        "KINDS": "runtime.weights.weight_types:WEIGHT_TYPES",
        "check_kind": "runtime.weights.weight_types:check_weight_type",
        "convert": "runtime.weights.weight_types:to_weight_type",
    },
    "runtime.tokenizer": {
        "read_tokenizer": "checkpoint.tokenizer:read_tokenizer",
        "tokenizer_from_json": "checkpoint.tokenizer:tokenizer_from_json",
    },
    "training.data": {
        "held_out": "training.data.documents:held_out",
        "open_dataset": "training.data.documents:open_dataset",
        "read_dataset": "training.data.documents:read_dataset",
        "read_texts": "training.data.documents:read_texts",
    },
    "training.distributed": {"stretch_of": "training.distributed:chunk_of"},
    "training.distributed.sequence": {"stretch_of": "training.distributed:chunk_of"},
    "training.finetune.trainer": {
        "CheckpointingTrainer": "training.finetune.trainer:FinetuneTrainer"
    },
    "training.lifecycle.atomic_checkpoints": {
        "StopSignals": "training.lifecycle.signals:StopSignals"
    },
    "training.pretrain.run": {"Outcome": "training.pretrain.run:RunResult"},
}
"""By module, old names in it, and where they are now: a module and the name there."""


def find_renamed(name: str) -> ModuleSpec | None:
    """Find an old module: its spec gives out the module that took its place.

    Args:
        name: a module's full name.

    Returns:
        None where no old module is called so.

    Example:
        >>> find_renamed("anymamba.runtime.mapping").name
        'anymamba.runtime.mapping'
    """
    new = MODULES.get(name.removeprefix("anymamba."))
    if new is None:
        return None
    # Not a subclass of Loader: importing that class would take longer than all else here.
    return ModuleSpec(name, _Renamed(f"anymamba.{new}"))  # type: ignore[arg-type]


class _Renamed:
    """Loads a module under its old name: it is the same module, of which there is one."""

    def __init__(self, new: str) -> None:
        self._new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warn_renamed(spec.name, self._new)
        module = import_module(self._new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Importing gave the module the old name's spec.
        module.__spec__ = self._spec


def old_names(module: str) -> Callable[[str], object]:
    """What a module takes as its `__getattr__` to go on answering to old names.

    Args:
        module: its full name.

    Example:
        >>> old_names("anymamba.runtime.tokenizer")("nothing")
        Traceback (most recent call last):
            ...
        AttributeError: module 'anymamba.runtime.tokenizer' has no attribute 'nothing'
    """
    known = NAMES[module.removeprefix("anymamba.")]

    def find(name: str) -> object:
        if name not in known:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = known[name].partition(":")
        warn_renamed(f"{module}.{name}", f"anymamba.{home}.{new}")
        return getattr(import_module(f"anymamba.{home}"), new)

    return find


def warn_renamed(old: str, new: str) -> None:
    """Warn the program that used an old name.

    Args:
        old: the name that it used.
        new: what that is called now.

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_renamed("Engine.feed", "Engine.prefill")
        >>> print(caught[0].message)
        Engine.feed is now Engine.prefill
    """
    # Between here and the program that asked lie this package and the import system. `warn` does
    # not count the frames of the latter's frozen part.
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
        level += not frame.f_code.co_filename.startswith("<frozen importlib")
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=level)


def _is_machinery(file: str) -> bool:
    return file.startswith(_PACKAGE) or "importlib" in file

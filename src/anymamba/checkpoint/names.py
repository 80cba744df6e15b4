"""The names of a model's tensors: every layout's translated to Transformers'.

Three namings exist, and each may come without its `backbone.` prefix. They differ in one place,
the embedding table, so one rule reads them all. Programs that wrap a model before they save it put
a prefix of their own in front of every name (`model.`, `module.`, `_orig_mod.`), which is removed:

| Transformers | original and minimal | |
| --- | --- | --- |
| `backbone.embeddings.weight` | `backbone.embedding.weight` | the embedding table |
| `backbone.layers.0.mixer.D` | the same | and all other tensors of a layer |
| `backbone.norm_f.weight` | the same | |
| `lm_head.weight` | the same | absent where it is the embedding table |
"""

from __future__ import annotations

from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

_BACKBONE_PARTS = ("embeddings.", "layers.", "norm_f.")
# Left by PEFT, Lightning and Trainers; by DataParallel; by torch.compile, also amid a name.
_WRAPPERS = ("base_model.", "model.", "module.")
_COMPILED = "_orig_mod."


def to_transformers_name(name: str) -> str:
    """Translate a tensor's name, in whichever layout, to the one Transformers uses.

    Args:
        name: as a file or a state dict spells it.

    Returns:
        Transformers' name. A name that no layout knows is returned as it is, so that the check
        against the expected names can report it in the words of the file.

    Example:
        >>> to_transformers_name("backbone.embedding.weight")  # original
        'backbone.embeddings.weight'
        >>> to_transformers_name("layers.3.mixer.A_log")  # minimal, or a bare MambaModel
        'backbone.layers.3.mixer.A_log'
        >>> to_transformers_name("lm_head.weight")
        'lm_head.weight'
        >>> to_transformers_name("model.backbone.norm_f.weight")  # from inside a Trainer's module
        'backbone.norm_f.weight'
    """
    part = name.replace(_COMPILED, "")
    while part.startswith(_WRAPPERS):
        part = part.partition(".")[2]
    if part.startswith("lm_head."):
        return part
    part = part.removeprefix("backbone.")
    if part.startswith("embedding."):
        part = part.replace("embedding.", "embeddings.", 1)
    return f"backbone.{part}" if part.startswith(_BACKBONE_PARTS) else name

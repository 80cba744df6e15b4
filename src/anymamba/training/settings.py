"""Every setting of a training run, in one flat dataclass: checked, read from YAML, written to YAML.

A YAML file, a preset and the command line name the same fields. What wins: flags over the file,
the file over its preset, the preset over the defaults here. Imports neither torch nor yaml until
it must, because the command line's `--help` is made from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from anymamba.checkpoint.io import shown, user_path
from anymamba.errors import ConfigError
from anymamba.runtime.native import MOST_THREADS

_OF_THE_PAPER = {
    "batch": 8,
    "accumulation": 32,
    "window": 2048,
    "order": "shuffled",
    "tokenizer": "bpe",
    "vocab_size": 32768,
    "final_learning_rate": 1e-5,
    "gradient_checkpointing": True,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"hidden_size": 64, "layers": 2, "batch": 8, "learning_rate": 5e-3},
    "small": {"hidden_size": 256, "layers": 8, "state_size": 16, "batch": 8, "dropout": 0.1},
    "medium": {"hidden_size": 512, "layers": 12, "batch": 16, "window": 512},
    "130m": {"hidden_size": 768, "layers": 24, "learning_rate": 3e-3, **_OF_THE_PAPER},
    "370m": {"hidden_size": 1024, "layers": 48, "learning_rate": 1.5e-3, **_OF_THE_PAPER},
}
"""Sizes with settings that suit them. The last two have the sizes and rates of the paper."""

MOST = 2**31 - 1
"""The largest whole number that a setting may be, unless it says otherwise."""

HIGHEST_SEED = 2**32 - 1
"""What NumPy's random numbers can begin from."""


def setting(default: Any, text: str, **facts: Any) -> Any:
    """A field with its help text and the values that it takes.

    Args:
        default: its default.
        text: the help of its option on the command line.
        **facts: `choices`; the bounds `low`, `high` (both included) and `above` (excluded); `many`
            for a list, of which it is what an item is called.
    """
    return field(default=default, metadata={"help": text, **facts})


def listed(text: str) -> dict[str, Any]:
    """The metadata of a field that holds a list of files."""
    return {"help": text, "many": "FILE"}


@dataclass
class Settings:
    """What a training run does. Every field is a line of the YAML file and an option of the
    command line; `field.metadata["help"]` says what it means.

    Raises:
        ConfigError: a value makes no sense, naming the field, the value and what was expected.

    Example:
        >>> Settings(data=["book.txt"], steps=100).batch
        8
        >>> Settings(data=["book.txt"], batch=0)
        Traceback (most recent call last):
        anymamba.errors.ConfigError: batch must be a whole number of at least 1, got 0
    """

    # What is read.
    data: list[str] = field(
        default_factory=list, metadata=listed("text files, JSON lines (.jsonl) or folders of them")
    )
    dataset: str | None = setting(None, "a Hugging Face dataset in place of --data")
    dataset_config: str | None = setting(None, "which of the dataset's configurations")
    dataset_split: str = setting("train", "which of the dataset's splits")
    text_field: str = setting("text", "where JSON lines and datasets have their text")
    validation_data: list[str] = field(
        default_factory=list, metadata=listed("texts held out; without them the end of the data is")
    )
    validation_share: float = setting(0.1, "share of the data's end held out", low=0.0, high=0.9)
    tokenizer: str = setting(
        "byte", "byte, bpe (trained on the data), or a folder or name on the hub to reuse"
    )
    vocab_size: int = setting(4096, "how many tokens a trained bpe has", low=257)
    end_of_text: bool = setting(True, "end each document with the tokenizer's end token, if any")

    # How it is laid in batches.
    window: int = setting(256, "tokens a row", low=1)
    batch: int = setting(8, "rows a batch, on each process", low=1)
    accumulation: int = setting(1, "batches a step", low=1)
    order: str = setting(
        "random",
        "random: windows from random places; shuffled: windows side by side, in a new order each "
        "time; carried: one after the other, the state carried on",
        choices=("random", "shuffled", "carried"),
    )

    # The model.
    model: str | None = setting(None, "a model to go on from, in place of random weights")
    architecture: str = setting(
        "mamba", "kind of model", choices=("mamba", "falcon_mamba", "mamba2")
    )
    hidden_size: int = setting(128, "width", low=1)
    layers: int = setting(4, "layers", low=1)
    state_size: int = setting(16, "states of a channel", low=1)
    expand: int = setting(2, "the inner width over the width", low=1)
    conv_kernel: int = setting(4, "width of the convolution", low=1)
    head_dim: int | None = setting(None, "channels of a head of Mamba-2; default 64", low=1)
    groups: int | None = setting(
        None, "groups of heads of Mamba-2 with B and C of their own; default 1", low=1
    )
    tie_embeddings: bool = setting(True, "use the embeddings as the head")
    initializer_range: float = setting(0.02, "how widely embeddings are drawn", low=0.0)
    rescale_residual: bool = setting(True, "draw out_proj smaller, the deeper the model")
    dropout: float = setting(0.0, "dropout on the residual branch", low=0.0, high=0.99)
    embedding_dropout: float = setting(0.0, "dropout on the embeddings", low=0.0, high=0.99)

    # The recipe.
    steps: int | None = setting(None, "how many steps to take", low=1)
    minutes: float | None = setting(None, "minutes to train, in place of --steps", low=0.0)
    learning_rate: float = setting(3e-3, "the highest learning rate", low=0.0)
    final_learning_rate: float = setting(3e-5, "the last learning rate", low=0.0)
    schedule: str = setting(
        "cosine", "how the rate falls after the warm-up", choices=("cosine", "linear", "constant")
    )
    warm_up: float = setting(0.03, "share of the budget in which the rate rises", low=0.0, high=1.0)
    beta1: float = setting(0.9, "of AdamW", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "of AdamW", low=0.0, high=0.99999)
    weight_decay: float = setting(0.1, "on matrices; never on A_log, D, biases, norms", low=0.0)
    decay_embeddings: bool = setting(True, "decay the embeddings as matrices")
    gradient_clip: float = setting(1.0, "largest norm of the gradients; 0 is any", low=0.0)
    seed: int = setting(1, "of the weights, the order and the dropout", low=0, high=HIGHEST_SEED)

    # How it is computed.
    dtype: str = setting(
        "auto",
        "auto: bfloat16 on GPUs that have it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    device: str = setting(
        "auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda", "mps")
    )
    threads: int | None = setting(None, "threads for torch", low=1, high=MOST_THREADS)
    gradient_checkpointing: bool = setting(False, "compute activations twice to save memory")
    compile: bool = setting(False, "compile the model with torch.compile")

    # What is looked at and kept.
    log_every: int = setting(10, "steps between lines of metrics", low=1)
    evaluate_every: int = setting(200, "steps between evaluations", low=1)
    evaluate_windows: int | None = setting(
        None, "evaluate on this many windows, spread evenly; default: all", low=1
    )
    evaluation_window: int | None = setting(None, "tokens of each window; default --window", low=1)
    patience: int | None = setting(None, "evaluations without progress before it stops", low=1)
    save_every: int = setting(200, "steps between checkpoints", low=1)
    keep_checkpoints: int = setting(2, "how many of the last checkpoints to keep", low=1)
    keep: str = setting("best", "which weights become the result", choices=("best", "last"))
    sample_prompt: str | None = setting(None, "continue this text at each evaluation")
    sample_tokens: int = setting(200, "tokens of that continuation", low=1)
    store: str = setting("float32", "type of the stored weights", choices=("float32", "bfloat16"))
    plot: bool = setting(True, "draw the curve of losses, as loss.png")
    tensorboard: bool = setting(True, "write for TensorBoard, where it is installed")

    # Where it goes.
    output: str = setting("trained", "the folder to write")

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_together()

    def _check_together(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("steps and minutes exclude each other: give one")
        if self.data and self.dataset:
            raise ConfigError("data and dataset exclude each other: give one")
        if self.order == "carried" and self.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing computes twice from a state that order 'carried' has "
                "overwritten by then: switch one of them off"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"final_learning_rate={self.final_learning_rate:g} must not exceed "
                f"learning_rate={self.learning_rate:g}"
            )

        self._check_heads()

    def _check_heads(self) -> None:
        if self.architecture != "mamba2":
            for name in ("head_dim", "groups"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} is for Mamba-2, and the architecture is {self.architecture!r}: "
                        "set architecture to 'mamba2' or leave it out"
                    )
        elif self.model is None:
            count, size, groups = self.heads.values()
            inner = self.expand * self.hidden_size
            if inner % size:
                raise ConfigError(f"head_dim={size} must divide expand * hidden_size = {inner}")
            if count % groups:
                raise ConfigError(f"groups={groups} must divide the {count} heads")

    @property
    def heads(self) -> dict[str, Any]:
        """The heads of a Mamba-2 in Transformers' fields; none of another architecture.

        Example:
            >>> Settings(architecture="mamba2").heads
            {'num_heads': 4, 'head_dim': 64, 'n_groups': 1}
        """
        if self.architecture != "mamba2":
            return {}
        size = self.head_dim or 64
        count = self.expand * self.hidden_size // size
        return {"num_heads": count, "head_dim": size, "n_groups": self.groups or 1}

    def to_yaml(self) -> str:
        """Every setting, in the order of the fields, as a file that `read_yaml` reads.

        Example:
            >>> Settings(data=["book.txt"]).to_yaml().splitlines()[:2]
            ['data:', '- book.txt']
        """
        import yaml

        text: str = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        return text


def check_fields(settings: Any) -> None:
    """Give each field of a dataclass made of `setting`s the value as it is kept.

    Raises:
        ConfigError: a value makes no sense, naming the field, the value and what was expected.
    """
    for entry in fields(settings):
        # A frozen dataclass takes them this way only.
        object.__setattr__(settings, entry.name, checked(entry, getattr(settings, entry.name)))


def checked(entry: Field[Any], value: Any) -> Any:
    """The value of a field as it is kept, or an error that says what it may be."""
    kind, choices = str(entry.type), entry.metadata.get("choices")
    if value is None and "None" in kind:
        return None
    if "many" in entry.metadata:
        names = checked_names(entry.name, choices, value)
        return names if kind.startswith("list") else tuple(names)
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise refuse(entry.name, "true or false", value)
        return value
    if kind.startswith("str"):
        if not isinstance(value, str) or not value or (choices and value not in choices):
            expected = f"one of {', '.join(choices)}" if choices else "a text"
            raise refuse(entry.name, expected, value)
        return value
    return checked_number(entry.name, kind.startswith("int"), value, entry.metadata)


def checked_names(name: str, choices: Sequence[str] | None, value: Any) -> list[str]:
    """A list of names; of those to choose from at least one."""
    values = [value] if isinstance(value, str) else value
    # An empty name would be the folder that one happens to be in.
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) and v for v in values):
        raise refuse(name, "a name or a list of names", value)
    if choices and not (values and {*values} <= {*choices}):
        raise refuse(name, f"some of {', '.join(choices)}", value)
    return list(values)


def checked_number(name: str, whole: bool, value: Any, facts: Mapping[str, Any]) -> Any:
    """A number within its bounds."""
    number = as_number(value)
    low, high = facts.get("low", -math.inf), facts.get("high", MOST if whole else math.inf)
    above = facts.get("above", -math.inf)
    fits = number is not None and math.isfinite(number) and above < number and low <= number <= high
    if number is None or not fits or (whole and number != int(number)):
        least = f" of at least {bound(low)}" if math.isfinite(low) else ""
        least = f" above {bound(above)}" if math.isfinite(above) else least
        # The bound of all whole numbers is told to those who exceed it only.
        told = "high" in facts or (number is not None and number > high)
        most = f" and at most {bound(high)}" if told and math.isfinite(high) else ""
        raise refuse(name, f"a {'whole ' if whole else ''}number{least}{most}", value)
    return int(number) if whole else float(number)


def bound(value: float) -> str:
    """A bound in a message; a whole number has all its digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def as_number(value: Any) -> float | None:
    """A number; also where YAML reads 3e-3, which lacks its point, as text."""
    if isinstance(value, bool):
        return None
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None
    except OverflowError:  # a whole number beyond all floats
        return math.inf


def refuse(name: str, expected: str, value: Any) -> ConfigError:
    """The error for a wrong value."""
    return ConfigError(f"{name} must be {expected}, got {shown(value)}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings that a YAML file names; `preset` may be one of them.

    Raises:
        ConfigError: the file cannot be read, is no mapping, or names what is no setting.
    """
    import yaml

    try:
        content = yaml.safe_load(user_path(path, ConfigError).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{str(path)!r} is not YAML of settings: it is nested too deep") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} must name settings, one a line, as in 'steps: 100'")
    for name in content:
        if name != "preset" and name not in Settings.__dataclass_fields__:
            raise ConfigError(f"{str(path)!r}: there is no setting {name!r}{meant(name)}")
    return content


def meant(name: Any) -> str:
    """What was probably meant."""
    from difflib import get_close_matches

    close = get_close_matches(str(name), list(Settings.__dataclass_fields__), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; anymamba train --help lists them"


def settings_from(
    config: str | Path | None = None, preset: str | None = None, **flags: Any
) -> Settings:
    """Settings from a YAML file, a preset and flags, each over the one before it.

    Args:
        config: a YAML file.
        preset: one of `PRESETS`; over the one that the file names.
        **flags: fields of `Settings`; None is "not given".

    Raises:
        ConfigError: a value makes no sense.

    Example:
        >>> settings_from(preset="tiny", layers=3).hidden_size
        64
    """
    content = {} if config is None else read_yaml(config)
    named = content.pop("preset", None)
    preset = named if preset is None else preset
    # A list of the file's is no key, so that the names are looked through.
    if preset is not None and preset not in list(PRESETS):
        raise ConfigError(f"there is no preset {shown(preset)}; there are {', '.join(PRESETS)}")
    given = {name: value for name, value in flags.items() if value is not None}
    # A budget of the one kind replaces one of the other.
    for one, other in (("steps", "minutes"), ("minutes", "steps")):
        if one in given and other not in given:
            content.pop(other, None)
    return Settings(**{**(PRESETS[preset] if preset is not None else {}), **content, **given})

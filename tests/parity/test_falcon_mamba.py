"""What Falcon-Mamba alone has: norms in its mixers, and a name of its own."""

from pathlib import Path

import pytest
import transformers
from tests.parity.architectures import BASE, FALCON_MAMBA

import anymamba
from anymamba.errors import ConfigError, InputError
from anymamba.modeling.fused import why_not_fused


def test_the_core_runs_the_whole_model() -> None:
    _, ours = FALCON_MAMBA.pair()
    assert why_not_fused(ours) is None
    ours.backbone.layers[1].mixer.rms_eps = 0.5
    assert why_not_fused(ours) == "layers.1.mixer: its rms_eps is 0.5, expected 0.3"


def test_the_wrong_class_is_refused(tmp_path: Path) -> None:
    _, ours = FALCON_MAMBA.pair()
    ours.save_pretrained(tmp_path / "falcon")
    anymamba.MambaForCausalLM(anymamba.MambaConfig(**BASE)).save_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match="'falcon_mamba', and MambaForCausalLM builds 'mamba'"):
        anymamba.MambaForCausalLM.from_pretrained(tmp_path / "falcon")
    with pytest.raises(InputError, match="use MambaForCausalLM"):
        anymamba.FalconMambaForCausalLM.from_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match="builds 'mamba'"):
        anymamba.MambaModel(ours.config)


def test_config() -> None:
    config = anymamba.FalconMambaConfig(hidden_size=32, use_falcon_mambapy=False)
    theirs = transformers.FalconMambaConfig(hidden_size=32).to_dict()
    assert {name: config.to_dict()[name] for name in theirs} == theirs
    with pytest.raises(ConfigError, match="FalconMambaConfig: mixer_rms_eps must be a finite"):
        config.mixer_rms_eps = -1.0

"""What a model keeps of a text: one state, the states of a batch, and whose they are."""

from anymamba.runtime.state.batch_state import Blocks
from anymamba.runtime.state.fingerprint import Identity
from anymamba.runtime.state.state import State, load_state

__all__ = ["Blocks", "Identity", "State", "load_state"]

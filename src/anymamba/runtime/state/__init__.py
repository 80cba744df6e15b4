"""What a model keeps of a text: one state, the states of a batch, and whose they are."""

from anymamba.runtime.state.batch_state import BatchState
from anymamba.runtime.state.state import Identity, State, check_state, load_state

__all__ = ["BatchState", "Identity", "State", "check_state", "load_state"]

"""Many texts for many users: who comes next, and states that are kept between requests."""

from anymamba.runtime.serving.prefix_cache import Found, PrefixCache
from anymamba.runtime.serving.request import Event, Request, Started, Submission
from anymamba.runtime.serving.scheduler import Scheduler
from anymamba.runtime.serving.state_folder import StateFolder

__all__ = [
    "Event",
    "Found",
    "PrefixCache",
    "Request",
    "Scheduler",
    "Started",
    "StateFolder",
    "Submission",
]

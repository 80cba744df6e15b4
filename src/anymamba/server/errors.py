"""What went wrong, in the form that the clients of an interface read."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from anymamba.errors import AnyMambaError, CheckpointError, NoTokenizerError, OverloadError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    **_TYPES,
    403: "permission_error",
    413: "request_too_large",
    503: "overloaded_error",
}


class ApiError(AnyMambaError):
    """A request that is not answered.

    Args:
        status: HTTP's status code.
        message: names the offending thing, what was expected and what to do.
        param: the field of the request that is wrong.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON in OpenAI's form."""
        message, param = _sendable(str(self)), self.param and _sendable(self.param)
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The answer's JSON in Anthropic's form."""
        other = "invalid_request_error" if self.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(self.status, other)
        return {"type": "error", "error": {"type": kind, "message": _sendable(str(self))}}

    def body_for(self, path: str) -> dict[str, Any]:
        """The answer's JSON in the form of the interface that a path belongs to."""
        return self.anthropic_body() if path.startswith("/v1/messages") else self.body()


def _sendable(text: str) -> str:
    """The text with half characters, which JSON may hold and UTF-8 may not, spelt out."""
    return text.encode(errors="backslashreplace").decode()


def as_api_error(error: AnyMambaError) -> ApiError:
    """The error as it is answered: a client's mistake, overload or a fault here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OverloadError):
        return ApiError(503, str(error), code="overloaded")
    if isinstance(error, NoTokenizerError):
        return ApiError(400, str(error), code="no_tokenizer")
    return ApiError(500 if isinstance(error, CheckpointError) else 400, str(error))


async def answer_error(request: Request, error: Exception) -> Response:
    """The response to a request that failed."""
    assert isinstance(error, AnyMambaError)
    found = as_api_error(error)
    headers = {"retry-after": "1"} if found.status in (429, 503) else None
    return JSONResponse(found.body_for(request.url.path), found.status, headers=headers)


async def answer_fault(request: Request, error: Exception) -> Response:
    """The response where there is a fault in the server, which logs it."""
    message = f"the server has a fault: {type(error).__name__}; its log has more"
    return JSONResponse(ApiError(500, message).body_for(request.url.path), 500)

"""A request that the proxy answers with an error instead of a worker's reply."""

from l40sd.model import SOON_S


class Refused(Exception):  # noqa: N818 - what happens to the request, in the protocol's word
    """Why, for the client.

    Args:
        status: HTTP status.
        code: A stable snake_case word for programs, e.g. ``"model_not_found"``.
        message: One sentence.
        param: The parameter it concerns, if it concerns one.
        retry_after_s: When to come again, for a 503.
        should_retry: False tells the client's library not to send it again (``x-should-retry``).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after_s: int = SOON_S,
        should_retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

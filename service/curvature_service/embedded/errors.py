"""The embedded server's one error."""


class ServeError(Exception):
    """The server cannot start; the message says why and what to do."""

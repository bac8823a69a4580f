"""Whether a URL can be a webhook's, said when it is submitted."""

import httpx

from curvature_service.errors import ApiError
from curvature_service.settings import ServiceSettings
from curvature_service.webhooks.addresses import is_host_name, literal_address, read_policy


def check_url(settings: ServiceSettings, url: str, *, param: str = "webhook.url") -> None:
    """Refuse a URL that nothing could be sent to. Names are resolved when a message is sent, and judged then.

    Raises:
        ApiError: `invalid_request`; `param` names the field.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _refusal(f"{url[:100]!r} is no URL: {error}", "send http://… or https://…", param) from error
    host = parsed.raw_host.decode("ascii")
    if parsed.scheme not in ("http", "https"):
        raise _refusal(f"a webhook's scheme is http or https, not {parsed.scheme!r}", "use one of these", param)
    if parsed.userinfo:
        remedy = "put a token into the path or the query, or verify the signature"
        raise _refusal("a webhook's URL may not hold a user or password", remedy, param)
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise _refusal(f"a port is a number from 1 to 65535, not {parsed.port}", "correct it", param)
    address = literal_address(host)
    if address is None and not is_host_name(host):
        raise _refusal(f"the URL names no host that could be sent to: {host[:100]!r}", "name one", param)
    policy = read_policy(settings.webhook_allow_private, settings.webhook_allowed_hosts)
    if address is not None and not policy.permits(host, address):
        remedy = "use a public address, or have the operator list this one in CURVATURE_WEBHOOK_ALLOWED_HOSTS"
        raise _refusal(f"the address {host} is not public; this server sends nothing there", remedy, param)


def _refusal(detail: str, remedy: str, param: str) -> ApiError:
    return ApiError("invalid_request", detail, param=param, remedy=remedy)

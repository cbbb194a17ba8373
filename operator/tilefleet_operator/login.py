"""How to reach the API server: a kubeconfig file, or the pod's own service account.

It sends no request.
"""

import importlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilefleet_operator.errors import ConfigInvalid

_TOKEN_PATH = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True, slots=True)
class Login:
    """How to reach the API server. ``token`` is called for each request, so that it may change."""

    server: str
    ssl_context: ssl.SSLContext | None
    token: Callable[[], str | None]
    ca_path: str | None = None
    certificate_path: str | None = None
    private_key_path: str | None = None
    insecure: bool = False


def login(
    kubeconfig: str | None,
    clock: Callable[[], float] = time.monotonic,
    *,
    context: str | None = None,
) -> Login:
    """Credentials from a kubeconfig file, or from the pod's service account when it is None.

    context: of the kubeconfig; None: its current one.

    Exec plugins and data fields of a kubeconfig work, because the ``kubernetes`` package reads it.
    Raises ConfigInvalid when there are no usable credentials.
    """
    # Imported here because it costs 2 s and 60 MB: only who connects pays.
    config: Any = importlib.import_module("kubernetes.config")
    configuration: Any = importlib.import_module("kubernetes.client").Configuration()
    try:
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(kubeconfig, context=context, client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        where = kubeconfig or "the pod's service account"
        raise ConfigInvalid(
            f"no credentials for the API server in {where}: {error}; pass --kubeconfig FILE"
        ) from error
    return Login(
        server=configuration.host,
        ssl_context=_ssl_context(configuration),
        token=_file_token(clock) if kubeconfig is None else _config_token(configuration, clock),
        ca_path=configuration.ssl_ca_cert,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        insecure=not configuration.verify_ssl,
    )


def context_namespace(kubeconfig: str, context: str | None = None) -> str:
    """Namespace of a context, None for the current one; "default" where it names none."""
    config: Any = importlib.import_module("kubernetes.config")
    contexts, current = config.list_kube_config_contexts(kubeconfig)
    found = next((one for one in contexts if one["name"] == context), current)
    return str((found.get("context") or {}).get("namespace") or "default")


def _ssl_context(configuration: Any) -> ssl.SSLContext | None:
    if not configuration.host.startswith("https"):
        return None
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    return context


def _cached(read: Callable[[], str | None], clock: Callable[[], float]) -> Callable[[], str | None]:
    """Call ``read`` at most once a minute: the kubelet renews a token long before its end."""
    last: list[tuple[float, str | None]] = []

    def token() -> str | None:
        if not last or clock() - last[0][0] >= 60.0:
            last[:] = [(clock(), read())]
        return last[0][1]

    return token


def _file_token(clock: Callable[[], float]) -> Callable[[], str | None]:
    return _cached(lambda: _TOKEN_PATH.read_text().strip(), clock)


def _config_token(configuration: Any, clock: Callable[[], float]) -> Callable[[], str | None]:
    def read() -> str | None:
        value = configuration.get_api_key_with_prefix("authorization", alias="BearerToken")
        return str(value).removeprefix("Bearer ").strip() if value else None

    return _cached(read, clock)

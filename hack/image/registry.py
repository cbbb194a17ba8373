"""Asks a registry whether it holds a tag, also from inside another network namespace.

Run as a program (`registry.py BASE_URL NAME TAG`) it prints the digest; that is how it is called
through nsenter, since Python 3.11 cannot change its own namespace.
"""

import subprocess
import sys
import urllib.error
import urllib.request

from engine import in_namespace

ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)


def digest(url: str, name: str, tag: str, timeout_seconds: float = 5) -> str | None:
    """Digest of a tag, None if the registry has no such tag. OSError if it does not answer."""
    request = urllib.request.Request(
        f"{url}/v2/{name}/manifests/{tag}", method="HEAD", headers={"Accept": ACCEPT}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_seconds) as response:
            return str(response.headers.get("Docker-Content-Digest", ""))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def holds(remote: str, netns_pid: int | None, plain: bool) -> bool:
    """True if the registry surely holds the reference; any doubt is False, and a push follows."""
    registry, _, rest = remote.partition("/")
    name, _, tag = rest.rpartition(":")
    command = [sys.executable, __file__, f"http{'' if plain else 's'}://{registry}", name, tag]
    found = subprocess.run(in_namespace(netns_pid) + command, capture_output=True, text=True)
    return not found.returncode and found.stdout.startswith("sha256:")


if __name__ == "__main__":
    try:
        print(digest(sys.argv[1], sys.argv[2], sys.argv[3]) or "absent")
    except OSError as problem:
        sys.exit(f"registry {sys.argv[1]}: {problem}")

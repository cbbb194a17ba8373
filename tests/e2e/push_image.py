"""Pushes a one-layer docker-archive to a registry: push_image.py ARCHIVE HOST:PORT REPOSITORY.

Runs inside the cluster's network, so a test needs no container tool to fill the registry.
"""

import hashlib
import http.client
import json
import sys
import tarfile
from urllib.parse import urlsplit

TYPES = {
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "layer": "application/vnd.docker.image.rootfs.diff.tar",
}


def call(host: str, method: str, url: str, body: bytes = b"", kind: str = "") -> str:
    """Send one request and return the Location header. Raises SystemExit if it is refused."""
    connection = http.client.HTTPConnection(host, timeout=10)
    headers = {"Content-Type": kind or "application/octet-stream"}
    connection.request(method, url, body, headers)
    response = connection.getresponse()
    text = response.read()
    if response.status not in (201, 202):
        raise SystemExit(f"{method} {url}: {response.status} {text!r}")
    return response.headers.get("Location", "")


def upload(host: str, repository: str, data: bytes, kind: str) -> dict[str, object]:
    """Upload one blob and return its descriptor."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    target = urlsplit(call(host, "POST", f"/v2/{repository}/blobs/uploads/"))
    call(host, "PUT", f"{target.path}?{target.query}&digest={digest}", data)
    return {"mediaType": TYPES[kind], "size": len(data), "digest": digest}


def main(archive_path: str, host: str, repository: str) -> None:
    with tarfile.open(archive_path) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(name)
            if member is None:
                raise SystemExit(f"{archive_path} holds no {name}")
            return member.read()

        index = json.loads(read("manifest.json"))[0]
        document = json.loads(read(index["Config"]))
        # containerd lists an image by the digest of its configuration: one of our own, so that
        # the pushed image and the archive's do not become names of one entry.
        document["config"]["Labels"] = {"pushed-to": host}
        config = upload(host, repository, json.dumps(document).encode(), "config")
        layers = [upload(host, repository, read(name), "layer") for name in index["Layers"]]
    manifest = {"schemaVersion": 2, "mediaType": TYPES["manifest"]}
    body = json.dumps({**manifest, "config": config, "layers": layers}).encode()
    call(host, "PUT", f"/v2/{repository}/manifests/1", body, TYPES["manifest"])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Command lines of the cluster's components. Pure: it starts nothing."""

from kit.layout import Layout
from kit.settings import NODE_ADDRESS, NODE_NAME, SERVICE_RANGE

# The defaults of 20 and 50 requests per second make 1,000 pods take 50 s instead of 7 s.
_FAST_CLIENT = ("--kube-api-qps=300", "--kube-api-burst=600")


def etcd(layout: Layout) -> list[str]:
    """The store. Without fsync: the cluster's data dies with the cluster anyway."""
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    return [
        "etcd",
        f"--data-dir={layout.run}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        "--unsafe-no-fsync",
    ]


def api_server(layout: Layout) -> list[str]:
    """The API server, with Node and RBAC authorisation and an audit log."""
    run = layout.run
    return [
        "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        "--bind-address=0.0.0.0",
        "--secure-port=6443",
        f"--advertise-address={NODE_ADDRESS}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--client-ca-file={run}/pki/ca.crt",
        f"--tls-cert-file={run}/pki/apiserver.crt",
        f"--tls-private-key-file={run}/pki/apiserver.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={run}/pki/sa.pub",
        f"--service-account-signing-key-file={run}/pki/sa.key",
        f"--token-auth-file={run}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={run}/etc/audit-policy.yaml",
        f"--audit-log-path={layout.audit_log}",
        # One file: a test that reads it must not lose lines to rotation.
        "--audit-log-maxsize=2000",
    ]


def controller_manager(layout: Layout) -> list[str]:
    """All upstream controllers. Nodes get no pod ranges: the one real node has a fixed one."""
    return [
        "kube-controller-manager",
        f"--kubeconfig={layout.run}/controller-manager.kubeconfig",
        "--use-service-account-credentials",
        "--bind-address=127.0.0.1",
        f"--root-ca-file={layout.run}/pki/ca.crt",
        f"--service-account-private-key-file={layout.run}/pki/sa.key",
        "--leader-elect=false",
        *_FAST_CLIENT,
    ]


def scheduler(layout: Layout) -> list[str]:
    """The upstream scheduler with its default profile."""
    return [
        "kube-scheduler",
        f"--kubeconfig={layout.run}/scheduler.kubeconfig",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
        *_FAST_CLIENT,
    ]


def kubelet(layout: Layout) -> list[str]:
    """The kubelet of the one node whose pods are real processes."""
    return [
        "kubelet",
        f"--config={layout.run}/etc/kubelet.yaml",
        f"--kubeconfig={layout.run}/kubelet.kubeconfig",
        f"--root-dir={layout.run}/kubelet",
        f"--node-ip={NODE_ADDRESS}",
        f"--hostname-override={NODE_NAME}",
    ]


def containerd(layout: Layout, config: str = "containerd.toml") -> list[str]:
    """The container runtime; containerd-tidy.toml starts it without its CRI part."""
    return ["containerd", "-c", f"{layout.run}/etc/{config}"]


def kwok(layout: Layout) -> list[str]:
    """Keeps the fake nodes, and only these, and their pods alive."""
    stages = [f"--config={path}" for path in sorted((layout.kit / "kwok").glob("*.yaml"))]
    return [
        "kwok",
        f"--kubeconfig={layout.run}/kwok.kubeconfig",
        "--manage-all-nodes=false",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        # Heartbeats: without them the nodes, and so their pods, stop being Ready after 50 s.
        "--node-lease-duration-seconds=40",
        # Apart from the range of the real node's pods.
        "--cidr=10.245.0.0/16",
        *stages,
    ]


def kube_proxy(layout: Layout) -> list[str]:
    """Service addresses, through nftables."""
    return ["kube-proxy", f"--config={layout.run}/etc/proxy.yaml"]


def coredns(layout: Layout) -> list[str]:
    """Cluster DNS on the node's address."""
    return ["coredns", "-conf", f"{layout.run}/etc/Corefile"]


def registry(layout: Layout) -> list[str]:
    """The image registry; its images outlive the cluster."""
    return ["docker-registry", "serve", f"{layout.run}/etc/registry.yaml"]

"""All parts of a running sweep: API server, garbage collector, proxy, kubelet, launcher, judge."""

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.kubelet import FakeKubelet
from tests.faults.life import STAGES, Golden, Life
from tests.faults.operators import LEASE_SECONDS, NAMESPACE, Launcher, Supervisor, build_clock_shim
from tests.faults.proxy import FaultProxy
from tests.faults.results import Results, say
from tests.faults.view import Admin, ClusterView, Json
from tests.operator.apiserver import ApiServer, binaries, grant, running, started


@dataclass
class Bench:
    """Where cases run, and where their verdicts go."""

    api: ApiServer
    proxy: FaultProxy
    admin: Admin
    view: ClusterView
    launcher: Launcher
    results: Results
    lease_seconds: float
    golden: Golden = field(default_factory=Golden)
    restarts: int = 0

    @property
    def patient_seconds(self) -> float:
        """Lease of operators that no fault is to end: a busy machine must not look like a fault."""
        return 3 * self.lease_seconds

    @property
    def limit_seconds(self) -> float:
        """Of one stage, in which several Leases may have to end one after another."""
        return 200 + 10 * self.lease_seconds

    @property
    def num_writes(self) -> dict[str, int]:
        """Writes in each stage of the undisturbed life."""
        return {stage: len(found) for stage, found in self.golden.writes.items()}

    async def life(self, namespace: str) -> Life:
        """A new life in a namespace of its own."""
        life = Life(self.admin, self.view, namespace, self.golden)
        await life.born()
        return life

    def operator(
        self, namespaces: list[str], user: str = "operator-a", lease_seconds: float | None = None
    ) -> Supervisor:
        """An operator for these namespaces, not yet started."""
        logs = self.results.logs or self.api.folder
        lease_seconds = lease_seconds or self.lease_seconds
        return Supervisor(
            self.api, self.proxy, self.launcher, namespaces, user, lease_seconds, logs
        )


@asynccontextmanager
async def bench(results: Results, lease_seconds: float = LEASE_SECONDS) -> AsyncIterator[Bench]:
    """Start everything; the first part that ends of itself ends the block."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        api = stack.enter_context(running(folder))
        collector = [
            binaries()["kube-controller-manager"], f"--kubeconfig={api.kubeconfig('admin')}",
            "--controllers=garbage-collector-controller", "--leader-elect=false", "--secure-port=0",
            "--kube-api-qps=300", "--kube-api-burst=600",
        ]  # fmt: skip
        stack.enter_context(started(collector, folder / "controller-manager.log"))
        shim = build_clock_shim(folder)
        _grant_everywhere(api)
        context = ssl.create_default_context(cafile=api.authority)
        admin = await stack.enter_async_context(Admin(api.url, api.tokens["admin"], context))
        proxy = await stack.enter_async_context(FaultProxy.running(api.url, context))
        launcher = await stack.enter_async_context(Launcher.running(shim))
        view = ClusterView(admin)
        made = Bench(api, proxy, admin, view, launcher, results, lease_seconds)
        async with asyncio.TaskGroup() as group:
            parts = [
                group.create_task(view.run()),
                group.create_task(FakeKubelet(admin, view).run()),
            ]
            proxy.restart = _Restart(made, group)
            try:
                yield made
            finally:
                for part in parts:
                    part.cancel()


class _Restart:
    """Kills the API server and starts it anew; one call while that is under way changes nothing."""

    def __init__(self, made: Bench, group: asyncio.TaskGroup) -> None:
        self.bench, self.group = made, group
        self._task: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        if self._task is None or self._task.done():
            self._task = self.group.create_task(asyncio.to_thread(self.bench.api.restart))
            self.bench.restarts += 1


def _grant_everywhere(api: ApiServer) -> None:
    """The chart's rights in all namespaces, and Leases: each case has one in its own."""
    api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    grant(api, NAMESPACE, everywhere=True)
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    rules = [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
         "verbs": ["get", "create", "update"]}
    ]  # fmt: skip
    api.create(f"{rbac}/clusterroles", {"metadata": {"name": "leases"}, "rules": rules})
    group = "rbac.authorization.k8s.io"
    role = {"apiGroup": group, "kind": "ClusterRole", "name": "leases"}
    subjects = [
        {"apiGroup": group, "kind": "User", "name": f"operator-{letter}"} for letter in "ab"
    ]
    binding: Json = {"metadata": {"name": "leases"}, "roleRef": role, "subjects": subjects}
    api.create(f"{rbac}/clusterrolebindings", binding)


async def undisturbed(made: Bench) -> None:
    """Live two lives without faults: the first becomes the measure, the second proves it stable."""
    first, again = [await made.life(name) for name in ("golden", "golden-again")]
    names = [first.namespace, again.namespace]
    async with made.operator(names, lease_seconds=made.patient_seconds).running():
        for stage in STAGES:
            scripts = [made.proxy.script(name) for name in names]
            before = [len(script.writes) for script in scripts]
            await asyncio.gather(first.begin(stage), again.begin(stage))
            made.golden.states[stage] = await first.settle(stage)
            made.golden.created[stage] = first.created[stage]
            await again.reach(stage, made.limit_seconds)
            made.golden.writes[stage] = scripts[0].writes[before[0] :]
            counts = [len(script.writes) - old for script, old in zip(scripts, before, strict=True)]
            say(f"undisturbed {stage}: {counts[0]} writes, and {counts[1]}")
    for life in (first, again):
        life.over()
        if life.problems:
            raise AssertionError(f"the undisturbed life is not stable: {life.problems}")

"""AMD's accelerators: PCI device ids, memory and how far each can be partitioned.

A model is matched by PCI device id, never by product-name, which is missing on virtual functions
(gpu-operator#183). Does not know nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """One model.

    device_ids: physical and virtual functions (gpu-operator gpu-nfd-default-rule.yaml, labeller
    amdgpu.ids). memory_gb: of the whole GPU, 10^9 bytes as the label vram counts. dies: XCDs, which
    is the number of partitions in CPX; 1 cannot be partitioned, None is not known.
    """

    device_ids: tuple[str, ...]
    memory_gb: int
    dies: int | None


PRODUCTS: Mapping[str, Product] = {
    "MI210": Product(("740f", "7410"), 64, 1),
    # A device is one of the two dies of a package.
    "MI250X": Product(("7408", "740c"), 64, 1),
    "MI300A": Product(("74a0",), 128, 6),
    "MI300X": Product(("74a1", "74a9", "74b5", "74bd"), 192, 8),
    "MI308X": Product(("74a2", "74a8", "74b6", "74bc"), 128, None),
    "MI325X": Product(("74a5", "74b9"), 256, 8),
    "MI350X": Product(("75a0", "75b0"), 288, 8),
    "MI355X": Product(("75a3", "75b3"), 288, 8),
}
# Modes of the GPUs that split it into a fixed number of partitions; CPX is one for each die.
_PARTITIONS = {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4}


def product_of(device_id: str) -> str | None:
    """Name of the product with a PCI device id, None when it is not known."""
    return next((name for name, p in PRODUCTS.items() if device_id in p.device_ids), None)


def ids_of(products: Iterable[str]) -> tuple[str, ...]:
    """PCI device ids of products, sorted."""
    return tuple(sorted(i for name in set(products) for i in PRODUCTS[name].device_ids))


def common_product(device_ids: Iterable[str]) -> Product | None:
    """The one product that all the ids belong to, else None."""
    names = {product_of(i) for i in device_ids}
    name = names.pop() if len(names) == 1 else None
    return PRODUCTS[name] if name else None


def partitions(compute: str, product: Product | None) -> int | None:
    """Partitions of one GPU in a compute mode, None when the product does not tell."""
    if compute == "CPX":
        return product.dies if product else None
    return _PARTITIONS.get(compute)


def compute_mode(count: int, product: Product | None) -> str:
    """The compute mode that shows `count` partitions of one GPU; empty when none is known."""
    if count > 1 and product is not None and count == product.dies:
        return "CPX"
    return next((mode for mode, known in _PARTITIONS.items() if known == count), "")

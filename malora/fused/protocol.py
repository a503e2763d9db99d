"""The interface of an adapted layer that the fused path relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from malora.config import MaloraConfig
    from malora.factors import Factors
    from malora.routing import Routing


class FusedLayer(Protocol):
    """An adapted layer as `malora.fused` sees it; `malora.MaloraLayer` is one.

    Attributes:
        name: its name in the base model.
        base_layer: the frozen linear layer, weight [m, n].
        settings: the config of each adapter, by its name.
    """

    name: str
    base_layer: nn.Linear
    in_features: int
    out_features: int
    training: bool
    settings: dict[str, MaloraConfig]

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight, which may be quantized and packed."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are switched on."""

    @property
    def disable_adapters(self) -> bool:
        """True while all adapters are switched off."""

    @property
    def merged(self) -> bool:
        """True while an adapter is merged into the frozen weight."""

    def factors(self, adapter: str) -> Factors:
        """Return the adapter's stacked experts."""

    def router(self, adapter: str) -> Tensor | None:
        """Return the adapter's router weight [N, n], or None if it has one expert."""

    def record_routing(self, adapter: str, routing: Routing, y: Tensor) -> Tensor:
        """Keep a routing in the model's log while that records, and return the layer's output y."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters, the frozen ones included."""

    def adapter_for_fused_path(self) -> str | None:
        """Return the adapter that can be computed together with the frozen layer, or None."""

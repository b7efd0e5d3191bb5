"""AW-Net: a dynamic sub-network and its router."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from awnet.nn.layers import MixBatchNorm2d
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing
from awnet.nn.routing import RoutedNetwork
from awnet.ops.running_statistics import with_joint_updates


def check_routing(routing: Routing, signal_widths: Sequence[int]) -> None:
    """Raises ValueError unless ``routing`` has one ω for each dynamic convolution."""
    if len(routing.filter_scales) != len(signal_widths):
        raise ValueError(
            f"routing.filter_scales must hold {len(signal_widths)} tensors, one for each dynamic "
            f"convolution, got {len(routing.filter_scales)}"
        )


class AWNet(RoutedNetwork):
    """``logits = dynamic(x, ω, p)`` with ω and p from ``router(x)``; Fig. 2 of the paper.

    Args:
        dynamic: the dynamic sub-network, called as ``dynamic(x, filter_scales, p_clean, is_clean)``; a
            :class:`~awnet.nn.Backbone` or the sub-network of :func:`~awnet.nn.convert`.
        router: with ``signal_widths`` equal to C_out of the dynamic convolutions.
    """

    dynamic: nn.Module
    router: AdversarialRouter | FixedRouter

    def __init__(self, dynamic: nn.Module, router: AdversarialRouter | FixedRouter) -> None:
        super().__init__()
        widths = getattr(dynamic, "signal_widths", None)
        if widths is not None and list(widths) != list(router.signal_widths):
            raise ValueError(
                f"the router's signal_widths must be those of the dynamic network, {list(widths)}, "
                f"got {list(router.signal_widths)}"
            )
        self.dynamic = dynamic
        self.router = router
        self.has_branches = any(
            isinstance(module, MixBatchNorm2d) and module.branches != "one" for module in dynamic.modules()
        )

    def route(self, x: Tensor) -> Routing:
        """One pass of the router over images [B, C, H, W]."""
        return self.router(x)

    @with_joint_updates
    def forward(self, x: Tensor, *, is_clean: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Images [B, C, H, W] in [0, 1] → logits [B, K].

        In train mode ``is_clean`` sends each sample through its branch (Eq. 13); in eval mode the branches
        are blended by ``routing.p_clean`` (Eq. 14).

        Args:
            x: images.
            is_clean: bool [B], for train mode; not needed with ``bn="one"``.
            routing: replaces the output of the router.

        Raises:
            ValueError: ``is_clean`` is missing or given in eval mode, or the routing or the images have wrong
                shapes.
            TypeError: wrong types.
        """
        is_clean, routing = self._steered(x, is_clean, routing)
        self._check_is_clean(is_clean, x, needed=self.has_branches, decider="router")
        if routing is None:
            routing = self.route(x)
        else:
            check_routing(routing, self.router.signal_widths)
        return self.dynamic(x, routing.filter_scales, None if self.training else routing.p_clean, is_clean)

    def extra_repr(self) -> str:
        dynamic, router = (sum(p.numel() for p in part.parameters()) for part in (self.dynamic, self.router))
        return f"parameters: {dynamic:,} in dynamic, {router:,} in router"

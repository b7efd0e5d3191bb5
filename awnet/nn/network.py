"""AW-Net: a dynamic sub-network and the router that steers it."""

from __future__ import annotations

from torch import Tensor, nn

from awnet.nn.layers import MixBatchNorm2d, check_is_clean
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing
from awnet.nn.routing import RoutedNetwork


class AWNet(RoutedNetwork):
    """``logits = dynamic(x, ω, p)`` with ω and p from ``router(x)``; Fig. 2 of the paper.

    Args:
        dynamic: the dynamic sub-network, called as ``dynamic(x, filter_scales, p_clean, is_clean)``; a
            :class:`~awnet.nn.Backbone` or what :func:`~awnet.nn.convert` makes.
        router: its ``signal_widths`` fit the dynamic convolutions.
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

    def forward(self, x: Tensor, *, is_clean: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Images [B, C, H, W] in [0, 1] → logits [B, K].

        In training mode ``is_clean`` bool [B] sends each sample through its own branch (Eq. 13); a network
        with ``bn="one"`` does not need it. In test mode the branches are blended by ``routing.p_clean``
        (Eq. 14) and ``is_clean`` must be absent. ``routing`` replaces the router's own.

        Raises ValueError or TypeError for a missing, misplaced or malformed ``is_clean`` and for a routing or
        images that do not fit.
        """
        is_clean, routing = self._steered(x, is_clean, routing)
        if self.training:
            if is_clean is None and self.has_branches:
                raise ValueError(
                    "is_clean is missing: in training mode pass bool [B], True for clean samples; "
                    "call model.eval() for test mode, where the router decides"
                )
            if is_clean is not None:
                check_is_clean(is_clean, x)
        elif is_clean is not None:
            raise ValueError(
                "is_clean is for training mode, but the model is in test mode: call model.train() first, "
                "or leave is_clean out and let the router decide"
            )
        if routing is None:
            routing = self.route(x)
        elif len(routing.filter_scales) != len(self.router.signal_widths):
            raise ValueError(
                f"routing.filter_scales must hold {len(self.router.signal_widths)} tensors, one for each "
                f"dynamic convolution, got {len(routing.filter_scales)}"
            )
        return self.dynamic(x, routing.filter_scales, None if self.training else routing.p_clean, is_clean)

    def extra_repr(self) -> str:
        dynamic, router = (sum(p.numel() for p in part.parameters()) for part in (self.dynamic, self.router))
        return f"parameters: {dynamic:,} in dynamic, {router:,} in router"

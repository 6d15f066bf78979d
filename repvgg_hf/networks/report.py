"""What `fuse` did to a network, and what it left."""

from dataclasses import dataclass, field

_SELECTS = 1e-2  # a difference of outputs that no rounding makes


@dataclass(frozen=True)
class FusedRegion:
    """A part of a network that is one convolution.

    Attributes:
        name: the module that is the convolution now, or that it would have been.
        parts: what it was computed by: modules, and operations of modules around them.
        method: how its kernel was found, "closed form" or "Jacobian"; `None` if it was not looked for.
        error: the largest difference to what it takes the place of, in float64, relative to the largest output.
        left: why it was left as it was; `None` if it was fused.
        keeps_branches: whether it is a block of branches that trains on, and fuses when it is quantized.
    """

    name: str
    parts: tuple[str, ...]
    method: str | None = None
    error: float | None = None
    left: str | None = None
    keeps_branches: bool = False

    def __str__(self) -> str:
        if self.left is not None:
            return f"{self.name}: left, {self.left}"
        kept = ", branches kept" if self.keeps_branches else ""
        parts = f"{len(self.parts)} parts ({', '.join(self.parts)})"
        return f"{self.name}: {parts}, {self.method}, error {self.error:.1e}{kept}"


@dataclass(frozen=True)
class FuseReport:
    """What `repvgg_hf.fuse` did; `print` it to read it.

    Attributes:
        regions: every part of the network that is one convolution, fused or left.
        layers_before, layers_after: the number of modules with parameters or buffers of their own.
        error: the largest difference of the model's outputs for the example before and after, in the model's dtype,
            relative to the largest output. A network that selects may differ by more than rounding: a detector whose
            boxes score almost the same takes others.
    """

    regions: list[FusedRegion] = field(repr=False)
    layers_before: int
    layers_after: int
    error: float

    @property
    def fused(self) -> list[FusedRegion]:
        """The regions that were fused."""
        return [region for region in self.regions if region.left is None]

    @property
    def left(self) -> list[FusedRegion]:
        """The regions that were left as they were."""
        return [region for region in self.regions if region.left is not None]

    def __str__(self) -> str:
        errors = [region.error for region in self.fused if region.error is not None]
        worst = f", the least exact to {max(errors):.1e} in float64" if errors else ""
        selects = " It may have selected others that are almost equal." if self.error > _SELECTS else ""
        head = (
            f"{len(self.fused)} regions fused{worst}; {len(self.left)} left. {self.layers_before} layers with weights "
            f"before, {self.layers_after} after. Outputs for the example differ by {self.error:.1e} of the largest."
            f"{selects}"
        )
        return "\n".join([head, *(f"  {region}" for region in [*self.fused, *self.left])])

"""What was chosen, and what is done with it.

A [`Selection`] is the one thing that passes from whatever chooses visual tokens (a controller, a published method, a
user's class) to whatever uses the choice (projector, prompt, decoder, FLOPs counter, picture).
"""

from dataclasses import dataclass, replace

import torch


@dataclass
class Selection:
    """
    The visual tokens that are kept of each unit: an image, a tile, a frame.

    Attributes:
        keep: `[num_images, num_patches]` bool, true where the patch is kept; rows of smaller units end in false.
        positions: `[num_images, max_keep]` int64, the kept patch positions in ascending order; rows of images that
            keep fewer end in -1.
        gates: `[num_images, num_patches]` or `None`; equal to `keep`, and carrying the gradient of the choice.
        is_soft: whether gates lie between 0 and 1 instead, with as many as are kept for their sum; then every token
            stays, as far as its gate says, and `keep` is what would be kept if one had to decide.
        features: `[num_images, max_keep, hidden_size]` of reducers that merge, or `None`: what stands at `positions`
            in place of the patches' own features. Rows at position -1 are ignored.
        loss: a term that the reducer adds to the training loss, or `None`.
        depth: `[num_images, num_patches]` int64 or `None`; in how many decoder layers each patch is seen, where a
            reducer acts inside the decoder.
        sizes: `[num_images]` int64 on the CPU, visual tokens of each unit before reduction, N; by default as many as
            `keep` has columns.
        sample: `[num_images]` int64 on the CPU, the prompt that shows each unit; `None` where there are no prompts.
        grids: rows and columns in which the tokens of each unit stand; see [`Units`].
        settings: of the family's own dial, one for each unit, where reducer `"native"` chose; otherwise `None`.
    """

    keep: torch.Tensor
    positions: torch.Tensor
    gates: torch.Tensor | None = None
    features: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    depth: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    grids: list[tuple[int, int]] | None = None
    settings: list[str] | None = None
    is_soft: bool = False

    def __post_init__(self) -> None:
        if self.sizes is None:
            self.sizes = torch.full((len(self.keep),), self.keep.shape[1])

    @classmethod
    def from_keep(cls, keep: torch.Tensor, gates: torch.Tensor | None = None) -> "Selection":
        """Builds a selection from its keep mask `[num_images, num_patches]`."""
        num_keep = keep.sum(dim=-1)
        max_keep = int(num_keep.max()) if len(keep) else 0
        kept_first = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)[:, :max_keep]
        is_kept = torch.arange(max_keep, device=keep.device) < num_keep[:, None]
        return cls(keep, kept_first.masked_fill(~is_kept, -1), gates)

    @classmethod
    def from_tokens(
        cls,
        features: torch.Tensor,
        positions: torch.Tensor,
        num_patches: int,
        spatial_order: bool = True,
        loss: torch.Tensor | None = None,
    ) -> "Selection":
        """
        Builds a selection of tokens that are no patches any more.

        Args:
            features: `[num_images, num_tokens, hidden_size]`.
            positions: `[num_images, num_tokens]` int64, for each token the patch in whose place it stands, or -1 for a
                column that is no token. No two tokens of an image share a place.
            num_patches: N.
            spatial_order: whether a token stands at its own position; otherwise the tokens stand in the order given
                and fill the places of all of them from the first to the last.
            loss: a term that is added to the training loss.
        """
        is_token = positions >= 0
        ranked, order = positions.masked_fill(~is_token, num_patches).sort(dim=-1, stable=True)
        if not spatial_order:
            order = (~is_token).to(torch.int8).argsort(dim=-1, stable=True)
        features = features.gather(1, order[..., None].expand_as(features))
        keep = torch.zeros(len(positions), num_patches + 1, dtype=torch.bool, device=positions.device)
        keep = keep.scatter(1, ranked, True)[:, :num_patches]
        return cls(keep, ranked.masked_fill(ranked == num_patches, -1), features=features, loss=loss)

    @classmethod
    def everything(cls, num_images: int, num_patches: int, device: torch.device) -> "Selection":
        """The selection that drops nothing."""
        positions = torch.arange(num_patches, device=device).expand(num_images, -1)
        return cls(torch.ones_like(positions, dtype=torch.bool), positions)

    def to(self, device: torch.device) -> "Selection":
        """On another device, but for what is always on the CPU."""
        names = ("keep", "positions", "gates", "features", "loss", "depth")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @property
    def is_token(self) -> torch.Tensor:
        """`[num_images, num_patches]` bool, false behind the last token of a unit that has fewer."""
        return (torch.arange(self.keep.shape[1]) < self.sizes[:, None]).to(self.keep.device)

    @property
    def num_keep(self) -> torch.Tensor:
        """Kept tokens per image, `[num_images]` int64."""
        return self.keep.sum(dim=-1)

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """
        The kept of the patches' features `[num_images, num_patches, hidden_size]`, or what they were merged into, as a
        shorter sequence `[num_images, max_keep, hidden_size]`; rows beyond an image's own number are zero.
        """
        if self.features is None:
            index = self.positions.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
            kept = self.gated(features).gather(1, index)
        else:
            kept = self.features
        return kept.masked_fill((self.positions < 0)[..., None], 0.0)

    def mask(self, features: torch.Tensor) -> torch.Tensor:
        """All features `[num_images, num_patches, hidden_size]` in their places, the dropped ones zero."""
        if self.features is not None:
            num_images, num_patches = self.keep.shape
            placed = self.features.new_zeros(num_images, num_patches, self.features.shape[-1])
            return placed.masked_scatter(self.keep[..., None], self.features[self.positions >= 0])
        return self.gated(features).masked_fill(~self.keep[..., None], 0.0)

    def gated(self, features: torch.Tensor) -> torch.Tensor:
        """
        The patches' features as they are, on a path that carries the gradient of the choice.

        Gate g moves a feature x between the image's mean feature m and itself, m + g (x - m), so that the gradient of
        the gate is the first-order effect of replacing the token by one that tells nothing apart. Scaling, g x, would
        ask another question: decoders normalise what they read, and a token scaled down says the same.
        """
        if self.gates is None:
            return features
        mean = features.mean(dim=1, keepdim=True).detach()
        if bool((self.sizes < features.shape[1]).any()):
            tokens = features.detach().masked_fill(~self.is_token[..., None], 0.0)
            mean = tokens.sum(dim=1, keepdim=True) / self.sizes.to(tokens)[:, None, None]
        gates = self.gates[..., None].to(features.dtype)
        # Kept features stay exactly what they are: (x - m) + m is x only up to rounding.
        return features + (gates - gates.detach()) * (features - mean).detach()

"""How the papers count FLOPs, and whether their figures come out.

The same LLaVA-1.5-7B is "99.3 G", "3.8 T" and "9.3 T" in different papers: some take a multiplication with its
addition for one, some leave out a matrix of the gated MLP, some print the mean of a layer. All count the decoder only.
Each convention here is the paper's formula for a layer; [`published_rows`] puts its figures beside ours.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..modeling.costs.decoder import DecoderCost, Growth, LayerCost
from ..modeling.costs.model_costs import Costs, ModelCosts
from ..modeling.costs.presets import preset_config
from ..modeling.decoder.execution_plan import UnitShares

NOT_COUNTED = ("vision", "reducer", "projector")
TOLERANCE = 0.03


@dataclass(frozen=True)
class Convention:
    """
    How a paper counts a decoder layer of n columns: with hidden size d, queries q and keys k wide, H heads and m
    neurons,

        projections n d (q + k) + pairs n^2 q + softmax n^2 H + mlp n d m + norms n d

    and the head on one position, head d V. Grouped-query attention makes k less than d, which no paper had.

    Attributes:
        paper: its name and arXiv id.
        projections, pairs, softmax, mlp, norms, head: the numbers in the formula.
        extra_columns: that the paper counts beside text and visual tokens.
        says: what is peculiar about it.
    """

    paper: str
    says: str
    projections: int
    pairs: int
    mlp: int
    softmax: int = 0
    norms: int = 0
    head: int = 0
    extra_columns: int = 0

    def decoder(self, text: PreTrainedConfig) -> DecoderCost:
        """The formula with a text model's sizes."""
        width, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or width // heads
        queries, keys = heads * head_dim, text.num_key_value_heads * head_dim
        layer = LayerCost.of_paper(
            projections=self.projections * width * (queries + keys),
            pair=self.pairs * queries + self.softmax * heads,
            mlp=self.mlp * width * text.intermediate_size,
            shared=self.norms * width,
        )
        head = self.head * width * text.vocab_size
        return DecoderCost((layer,) * text.num_hidden_layers, Growth(0, once=head), head)


# 2 n (4 d^2 + 3 d m) + 4 n^2 d for the products, 5 H n^2 for the softmax, 14 n d for two norms and 2 n d for each of
# two additions; at the head a multiplication with its addition counts once.
LLM_VIEWER = {"projections": 4, "pairs": 4, "mlp": 6, "softmax": 5, "norms": 18, "head": 1}
CONVENTIONS = {
    # 4 n d^2 + 2 n^2 d + 2 n d m (section 4), where Vicuna's MLP has a third matrix.
    "fastv": Convention(
        "FastV (arXiv 2403.06764)",
        "1 MAC = 1 FLOP, MLP of two matrices, whole sequence; the paper prints the mean of a layer",
        projections=2,
        pairs=2,
        mlp=2,
    ),
    "prumerge": Convention(
        "PruMerge (arXiv 2403.15388)",
        "1 MAC = 2 FLOPs (head: 1), softmax, norms and additions counted, whole sequence (LLM-Viewer)",
        **LLM_VIEWER,
    ),
    "adallava": Convention(
        "AdaLLaVA (arXiv 2503.10905)",
        "as PruMerge, with a latency token and, as the authors count, one more; skipped layers count nothing",
        # The latency token, and the one by which the authors' evaluation counts the prompt too long.
        extra_columns=2,
        **LLM_VIEWER,
    ),
}


def count_flops(
    costs: ModelCosts,
    text_tokens: int,
    convention: str = "adavtp",
    *,
    plan: UnitShares | None = None,
    layer_tokens: Sequence[int] | None = None,
    new_tokens: int = 1,
    dtype: Any = None,
    **asked: Any,
) -> Costs:
    """
    The FLOPs of one prompt as a paper counts them; what it does not count is 0.

    Args:
        costs: the model's.
        convention: `"adavtp"` for our own, or a name in `CONVENTIONS`.
        layer_tokens: for a paper's convention, visual tokens that each decoder layer sees, in place of a reducer.
        text_tokens, plan, new_tokens, dtype: see [`ModelCosts.of_prompt`].
        asked: `reducer`, `token_budget` and `num_images`, see there.

    Raises:
        ValueError: if the convention is not known; see also [`ModelCosts.of_prompt`].
    """
    if convention == "adavtp":
        return costs.of_prompt(text_tokens, plan=plan, new_tokens=new_tokens, dtype=dtype, **asked)
    if convention not in CONVENTIONS:
        raise ValueError(f"`convention` is {convention!r}; allowed: adavtp, {', '.join(CONVENTIONS)}.")
    paper = CONVENTIONS[convention]
    decoder = paper.decoder(costs.config.text_config)
    tokens = costs.visual_tokens("full" if layer_tokens is not None else asked.pop("reducer", None), **asked)
    if layer_tokens is not None:
        tokens = replace(tokens, of_layers=tuple(layer_tokens))
    seen = [n + paper.extra_columns for n in costs.columns(text_tokens, tokens)]
    decode = decoder.decode(seen, plan)
    return Costs(
        vision=0.0,
        reducer=0.0,
        projector=0.0,
        prefill=decoder.prefill(seen, plan),
        decode_per_token=decode.steps(1),
        kv_bytes=float(costs.decoder.kv_numbers(seen, plan) * costs.bytes_per_number(dtype)),
        mean_visual_tokens=tokens.mean,
        new_tokens=new_tokens,
        layer_tokens=tuple(seen),
        convention=convention,
        decode=decode,
    )


def latency_plan(latency: float, text: PreTrainedConfig, unit: str = "layer") -> UnitShares:
    """
    The units that AdaLLaVA (arXiv 2503.10905) runs within a latency budget: the first half of the layers always, and
    of the other half's units u = max(0, floor(U l) - U / 2), of U in the whole decoder.

    Args:
        latency: l in [0, 1], the share of a full pass that is allowed; below a half it is the first half's.
        text: the text model's configuration.
        unit: `"layer"`, or `"head"`: 8 heads of a layer with their share of its MLP. Which layers' heads run is the
            image's to say and changes nothing in the sum, so here they are spread evenly.

    Raises:
        ValueError: if an argument is not allowed.
    """
    if not 0.0 <= latency <= 1.0:
        raise ValueError(f"`latency` is {latency}; allowed are shares of a full pass, from 0 to 1.")
    if unit not in ("layer", "head"):
        raise ValueError(f"`unit` is {unit!r}; allowed are 'layer' and 'head'.")
    depth = text.num_hidden_layers
    prefix = depth // 2
    if unit == "layer":
        # A latency as it is written: 0.7 of 10 layers are 7, and not 6.999...
        more = max(0, int(depth * latency + 1e-6) - prefix)
        shares = (1.0,) * (prefix + more) + (0.0,) * (depth - prefix - more)
    else:
        units = depth * text.num_attention_heads // 8
        more = max(0, int(units * latency + 1e-6) - units // 2)
        shares = (1.0,) * prefix + (more / (units - units // 2),) * (depth - prefix)
    return UnitShares(shares, shares)


def per_layer(costs: Costs) -> float:
    """Prefill divided by the number of layers, which is what FastV's table prints."""
    return costs.prefill / len(costs.layer_tokens)


# ---------------------------------------------------------------- the papers' figures beside ours


@dataclass(frozen=True)
class PublishedRow:
    """
    A published figure for LLaVA-1.5-7B.

    Attributes:
        paper, setting: whose it is, and of what.
        unit: of both figures.
        published, ours: the figures; ours is `None` where it cannot be worked out.
        reason: where they differ by more than 3 %, why; else what the setting takes for granted.
    """

    paper: str
    setting: str
    unit: str
    published: float
    ours: float | None
    reason: str

    @property
    def ratio(self) -> float | None:
        """Ours by theirs."""
        return None if self.ours is None else self.ours / self.published

    @property
    def is_reproduced(self) -> bool:
        """Whether they differ by at most 3 %."""
        return self.ratio is not None and abs(self.ratio - 1) <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {**asdict(self), "ratio": self.ratio, "reproduced": self.is_reproduced}


# FastV's table gives no length; this one makes its unpruned row come out, and the others are then free.
_FASTV_TEXT = 36
_FASTV = [
    ("no pruning", None, 99.3),
    ("K=2, R=50%", {"name": "fastv", "layer": 2, "ratio": 0.5}, 54.6),
    ("K=2, R=75%", {"name": "fastv", "layer": 2, "ratio": 0.75}, 32.8),
    ("K=2, R=90%", {"name": "fastv", "layer": 2, "ratio": 0.9}, 19.9),
    ("K=3, R=50%", {"name": "fastv", "layer": 3, "ratio": 0.5}, 56.6),
    ("K=3, R=75%", {"name": "fastv", "layer": 3, "ratio": 0.75}, 34.8),
    ("K=5, R=50%", {"name": "fastv", "layer": 5, "ratio": 0.5}, 59.6),
]
_PROMPT = 60


def published_rows() -> list[PublishedRow]:
    """The published FLOPs of FastV, PruMerge, AdaLLaVA and DyRate for LLaVA-1.5-7B, and ours in their conventions."""
    costs = ModelCosts.of(preset_config("llava-1.5-7b"))
    return [*_fastv_rows(costs), *_prumerge_rows(costs), *_adallava_rows(costs), *_dyrate_rows(costs)]


def _fastv_rows(costs: ModelCosts) -> Iterator[PublishedRow]:
    reason = f"taken: {_FASTV_TEXT} text tokens, with which the unpruned row comes out; mean of a layer"
    for setting, reducer, published in _FASTV:
        flops = count_flops(costs, _FASTV_TEXT, "fastv", reducer=reducer or "full")
        yield PublishedRow("FastV", setting, "GFLOPs", published, per_layer(flops) / 1e9, reason)


def _prumerge_rows(costs: ModelCosts) -> Iterator[PublishedRow]:
    for kept, published in ((576, 9.3), (40, 0.91)):

        def prefill(text_tokens: int, kept: int = kept) -> float:
            visual = [kept] * costs.config.text_config.num_hidden_layers
            return count_flops(costs, text_tokens, "prumerge", layer_tokens=visual).prefill / 1e12

        fitting = bisect_left(range(1000), published, key=prefill)
        reason = f"the paper's two figures fit no one prompt: this one takes about {fitting} text tokens"
        setting = f"{kept} visual, {_PROMPT} text tokens"
        yield PublishedRow("PruMerge", setting, "TFLOPs", published, prefill(_PROMPT), reason)


def _adallava_rows(costs: ModelCosts) -> Iterator[PublishedRow]:
    text = costs.config.text_config

    def prefill(latency: float, **asked: Any) -> Costs:
        return count_flops(costs, _PROMPT, "adallava", reducer="full", plan=latency_plan(latency, text), **asked)

    taken = f"taken: {_PROMPT} text tokens (the MME prompts' own lengths are not stated)"
    limited = prefill(0.85, new_tokens=2)
    of_both = {"prefill": (7.2277, limited.prefill), "with the answer": (7.239, limited.total)}
    for what, (published, ours) in of_both.items():
        yield PublishedRow("AdaLLaVA", f"L, latency 0.85, {what}", "TFLOPs", published, ours / 1e12, taken)
    for latency, published in ((0.8, 78.0), (0.6, 57.0), (0.5, 51.0)):
        ran = sum(share > 0 for share in latency_plan(latency, text).heads)
        ours = 100 * prefill(latency).prefill / prefill(1.0).prefill
        reason = f"{ran} of 32 layers"
        if abs(ours / published - 1) > TOLERANCE:
            reason = f"the figure is a third party's and rounded; a cut of whole layers can only be {ran} of 32"
        yield PublishedRow("AdaLLaVA", f"L, latency {latency}", "% of full", published, ours, reason)


def _dyrate_rows(costs: ModelCosts) -> Iterator[PublishedRow]:
    full = count_flops(costs, _PROMPT, "fastv", reducer="full").prefill
    fastv = count_flops(costs, _PROMPT, "fastv", reducer={"name": "fastv", "layer": 3, "ratio": 0.5}).prefill
    known = f"the figure is known to us from notes on the paper; taken: {_PROMPT} text tokens, FastV's convention"
    unknown = (
        "each step's rate is a learned predictor's choice; neither the rates nor the lengths of the answers "
        "behind the figure are known to us, and there is no public code"
    )
    quoted = "FastV, K=3, R=50%, as quoted there"
    yield PublishedRow("DyRate", quoted, "% of full", 57.90, 100 * fastv / full, known)
    yield PublishedRow("DyRate", "DyRate", "% of full", 33.33, None, unknown)

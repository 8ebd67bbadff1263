"""How the papers count FLOPs, and whether their figures come out.

The same LLaVA-1.5-7B is "99.3 G", "3.8 T" and "9.3 T" in different papers: some take a multiplication with its
addition for one, some leave out a matrix of the gated MLP, some print the mean of a layer. All count the decoder only.
Each convention here is the paper's formula for a layer; [`published_rows`] puts its figures beside ours.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .decoder_flops import DecodeCost, ExecutionPlan, kv_numbers
from .flops import Asked, Flops, count_flops, mean_visual_tokens
from .flops_presets import preset_config
from .model_shape import DecoderShape
from .token_plan import TokenPlan

NOT_COUNTED = ("vision", "reducer", "projector")
TOLERANCE = 0.03


def fastv_layer(decoder: DecoderShape, n: int, keys: int, heads: float, mlp: float) -> float:
    """
    FastV (arXiv 2403.06764, section 4): 4 n d^2 + 2 n^2 d + 2 n d m, a multiplication with its addition counted once.
    The MLP has two matrices there, where Vicuna's has three. Grouped-query attention makes 4 n d^2 less.
    """
    width = decoder.hidden_size
    projections = 2 * n * width * (decoder.query_width + decoder.key_width)
    return heads * (projections + 2 * n * keys * decoder.query_width) + mlp * 2 * n * width * decoder.mlp_size


def llm_viewer_layer(decoder: DecoderShape, n: int, keys: int, heads: float, mlp: float) -> float:
    """
    LLM-Viewer, which PruMerge and AdaLLaVA count with: 2 n (4 d^2 + 3 d m) + 4 n^2 d for the products, 5 H n^2 for the
    softmax, 14 n d for two norms and 2 n d for each of two additions.
    """
    width = decoder.hidden_size
    projections = 4 * n * width * (decoder.query_width + decoder.key_width)
    attention = 4 * n * keys * decoder.query_width + 5 * decoder.num_heads * n * keys
    return heads * (projections + attention) + mlp * 6 * n * width * decoder.mlp_size + 18 * n * width


def llm_viewer_head(decoder: DecoderShape) -> float:
    """The head on one position, a multiplication with its addition counted once."""
    return float(decoder.hidden_size * decoder.vocab_size)


@dataclass(frozen=True)
class Convention:
    """
    How a paper counts.

    Attributes:
        paper: its name and arXiv id.
        layer: FLOPs of a layer for n columns that attend to `keys`, with shares of heads and of the MLP that run.
        head: FLOPs of the head.
        extra_columns: that the paper counts beside text and visual tokens.
        says: what is peculiar about it.
    """

    paper: str
    layer: Callable[[DecoderShape, int, int, float, float], float]
    head: Callable[[DecoderShape], float]
    extra_columns: int
    says: str

    def layers(self, decoder: DecoderShape, n: list[int], keys: list[int], units: ExecutionPlan) -> float:
        """The sum over the layers that run, of n columns that attend to so many keys, and the head."""
        layers = zip(n, keys, units.heads, units.mlp, strict=True)
        return self.head(decoder) + sum(self.layer(decoder, *layer) for layer in layers if layer[2] or layer[3])

    def count(
        self,
        decoder: DecoderShape,
        columns: tuple[int, ...],
        units: ExecutionPlan,
        asked: Asked,
        tokens: TokenPlan,
    ) -> Flops:
        """See [`count_batch_flops`]; what the paper does not count is 0."""
        rows, seen = asked.prompts.rows, [n + self.extra_columns for n in columns]
        alone = [1] * len(seen)
        step = self.layers(decoder, alone, [0] * len(seen), units)
        per_key = tuple(
            rows * (self.layer(decoder, 1, 1, heads, mlp) - self.layer(decoder, 1, 0, heads, mlp))
            for heads, mlp in zip(units.heads, units.mlp, strict=True)
        )
        decode = DecodeCost(rows * step, per_key, tuple(seen), (None,) * len(seen))
        return Flops(
            vision=0.0,
            reducer=0.0,
            projector=0.0,
            prefill=rows * self.layers(decoder, seen, seen, units),
            decode_per_token=decode.steps(1),
            kv_bytes=float(rows * kv_numbers(decoder, seen, units) * asked.bytes_per_number),
            mean_visual_tokens=mean_visual_tokens(tokens),
            layer_tokens=tuple(seen),
            convention=asked.convention,
            decode=decode,
        )


CONVENTIONS = {
    "fastv": Convention(
        "FastV (arXiv 2403.06764)",
        fastv_layer,
        lambda decoder: 0.0,
        extra_columns=0,
        says="1 MAC = 1 FLOP, MLP of two matrices, whole sequence; the paper prints the mean of a layer",
    ),
    "prumerge": Convention(
        "PruMerge (arXiv 2403.15388)",
        llm_viewer_layer,
        llm_viewer_head,
        extra_columns=0,
        says="1 MAC = 2 FLOPs (head: 1), softmax, norms and additions counted, whole sequence (LLM-Viewer)",
    ),
    "adallava": Convention(
        "AdaLLaVA (arXiv 2503.10905)",
        llm_viewer_layer,
        llm_viewer_head,
        # The latency token, and the one by which the authors' evaluation counts the prompt too long.
        extra_columns=2,
        says="as PruMerge, with a latency token and, as the authors count, one more; skipped layers count nothing",
    ),
}


def latency_plan(latency: float, decoder: DecoderShape, unit: str = "layer") -> ExecutionPlan:
    """
    The units that AdaLLaVA (arXiv 2503.10905) runs within a latency budget: the first half of the layers always, and
    of the other half's units u = max(0, floor(U l) - U / 2), of U in the whole decoder.

    Args:
        latency: l in [0, 1], the share of a full pass that is allowed; below a half it is the first half's.
        decoder: its shape.
        unit: `"layer"`, or `"head"`: 8 heads of a layer with their share of its MLP. Which layers' heads run is the
            image's to say and changes nothing in the sum, so here they are spread evenly.

    Raises:
        ValueError: if an argument is not allowed.
    """
    if not 0.0 <= latency <= 1.0:
        raise ValueError(f"`latency` is {latency}; allowed are shares of a full pass, from 0 to 1.")
    if unit not in ("layer", "head"):
        raise ValueError(f"`unit` is {unit!r}; allowed are 'layer' and 'head'.")
    depth, prefix = decoder.num_layers, decoder.num_layers // 2
    if unit == "layer":
        # A latency as it is written: 0.7 of 10 layers are 7, and not 6.999...
        more = max(0, int(depth * latency + 1e-6) - prefix)
        shares = (1.0,) * (prefix + more) + (0.0,) * (depth - prefix - more)
    else:
        units = depth * decoder.num_heads // 8
        more = max(0, int(units * latency + 1e-6) - units // 2)
        shares = (1.0,) * prefix + (more / (units - units // 2),) * (depth - prefix)
    return ExecutionPlan(shares, shares)


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
    return [*_fastv_rows(), *_prumerge_rows(), *_adallava_rows(), *_dyrate_rows()]


def _fastv_rows() -> list[PublishedRow]:
    config = preset_config("llava-1.5-7b")
    rows = []
    for setting, reducer, published in _FASTV:
        asked = {"reducer": "full"} if reducer is None else {"reducer": reducer}
        flops = count_flops(config, _FASTV_TEXT, convention="fastv", **asked)
        reason = f"taken: {_FASTV_TEXT} text tokens, with which the unpruned row comes out; mean of a layer"
        rows.append(PublishedRow("FastV", setting, "GFLOPs", published, flops.prefill_per_layer / 1e9, reason))
    return rows


def _prumerge_rows() -> list[PublishedRow]:
    config = preset_config("llava-1.5-7b")
    rows = []
    for kept, published in ((576, 9.3), (40, 0.91)):

        def prefill(text_tokens: int, kept: int = kept) -> float:
            visual = [kept] * config.text_config.num_hidden_layers
            return count_flops(config, text_tokens, layer_tokens=visual, convention="prumerge").prefill / 1e12

        fitting = bisect_left(range(1000), published, key=prefill)
        reason = f"the paper's two figures fit no one prompt: this one takes about {fitting} text tokens"
        setting = f"{kept} visual, {_PROMPT} text tokens"
        rows.append(PublishedRow("PruMerge", setting, "TFLOPs", published, prefill(_PROMPT), reason))
    return rows


def _adallava_rows() -> list[PublishedRow]:
    config = preset_config("llava-1.5-7b")
    decoder = DecoderShape.of(config)

    def prefill(latency: float, **asked: Any) -> Flops:
        plan = latency_plan(latency, decoder)
        return count_flops(config, _PROMPT, reducer="full", convention="adallava", plan=plan, **asked)

    taken = f"taken: {_PROMPT} text tokens (the MME prompts' own lengths are not stated)"
    limited = prefill(0.85, new_tokens=2)
    rows = [
        PublishedRow("AdaLLaVA", "L, latency 0.85, prefill", "TFLOPs", 7.2277, limited.prefill / 1e12, taken),
        PublishedRow("AdaLLaVA", "L, latency 0.85, with the answer", "TFLOPs", 7.239, limited.total / 1e12, taken),
    ]
    weak = "the figure is a third party's and rounded; a cut of whole layers can only be {layers} of 32"
    for latency, published in ((0.8, 78.0), (0.6, 57.0), (0.5, 51.0)):
        ran = sum(share > 0 for share in latency_plan(latency, decoder).heads)
        ours = 100 * prefill(latency).prefill / prefill(1.0).prefill
        reason = weak.format(layers=ran) if abs(ours / published - 1) > TOLERANCE else f"{ran} of 32 layers"
        rows.append(PublishedRow("AdaLLaVA", f"L, latency {latency}", "% of full", published, ours, reason))
    return rows


def _dyrate_rows() -> list[PublishedRow]:
    config = preset_config("llava-1.5-7b")
    full = count_flops(config, _PROMPT, reducer="full", convention="fastv").prefill
    fastv = count_flops(config, _PROMPT, reducer={"name": "fastv", "layer": 3, "ratio": 0.5}, convention="fastv")
    return [
        PublishedRow(
            "DyRate",
            "FastV, K=3, R=50%, as quoted there",
            "% of full",
            57.90,
            100 * fastv.prefill / full,
            f"the figure is known to us from notes on the paper; taken: {_PROMPT} text tokens, FastV's convention",
        ),
        PublishedRow(
            "DyRate",
            "DyRate",
            "% of full",
            33.33,
            None,
            "each step's rate is a learned predictor's choice; neither the rates nor the lengths of the answers "
            "behind the figure are known to us, and there is no public code",
        ),
    ]

"""Counted FLOPs of a training step: what every product of the forward pass costs on the way back.

A product y = x w of f FLOPs costs f for the gradient of w, if w trains, and f for that of x, if something in front of
it trains. Attention, two products forward, is five on the way back where its kernel keeps no scores. A checkpointed
layer runs once more, up to its last product. So a frozen part costs nothing behind the first trained one's back, the
forward again where a gradient only passes through, and twice the forward where it trains. Units are `flops.py`'s.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.budget.schedule import StackBudget
from ..modeling.reducers.bank import ReducerSpec
from ..modeling.reducers.bank import Step as ReducerStep
from ..modeling.reducers.base import REDUCERS
from .decoder_flops import Prompts, inside_decoder_flops, layer_columns
from .model_shape import BUDGET_ENCODING, DecoderShape, ModelShape
from .reducer_flops import TowerRun, attention_rows, budget_cross_attention, image_flops, product, tower_run
from .settings import FULL
from .token_plan import TokenPlan, plan_tokens, weightless_steps

PARTS = ("controller", "projector", "vision", "decoder")
# Scores once more, and the gradients of weights, values, queries and keys: five products for two. Without the first
# where scores are kept; the second alone where nothing but a bias on the scores wants a gradient.
FUSED_ATTENTION, KEPT_SCORES, ONLY_BIAS = 2.5, 2.0, 0.5


@dataclass(frozen=True)
class Trained:
    """
    What trains.

    Attributes:
        controller, projector, vision, decoder: whether the part does; the controller with the budget token.
        lora_rank: r of adapters on every linear map of the decoder's layers, which then train in the decoder's place;
            `None` for none.
    """

    controller: bool = False
    projector: bool = False
    vision: bool = False
    decoder: bool = False
    lora_rank: int | None = None

    @classmethod
    def of(cls, train_parts: Sequence[str], lora_rank: int | None = None) -> "Trained":
        """
        Args:
            train_parts: names as in `AdaVTPTrainingArguments`.
            lora_rank: 1 or more, with `"decoder"` among the parts.

        Raises:
            ValueError: if a part is not known or none is named, or adapters are asked for and the decoder is frozen.
        """
        if set(train_parts) - set(PARTS) or not train_parts:
            raise ValueError(f"`train_parts` is {list(train_parts)}; allowed are one or more of {list(PARTS)}.")
        if lora_rank is not None and (lora_rank < 1 or "decoder" not in train_parts):
            raise ValueError(
                f"`lora_rank` is {lora_rank} and `train_parts` {list(train_parts)}; adapters have a rank of 1 or more "
                "and train in the decoder's place, so name 'decoder' among the parts."
            )
        return cls(**dict.fromkeys(train_parts, True), lora_rank=lora_rank)

    @property
    def decoder_weights(self) -> bool:
        """Whether the decoder's own weights train."""
        return self.decoder and self.lora_rank is None


@dataclass(frozen=True)
class Step:
    """
    How a training step is carried out.

    Attributes:
        trained: what trains.
        checkpointing: whether layers keep only what enters them, and run again on the way back.
        gates: `"features"` or `"attention"`, see [`AdaVTPConfig`].
        losses: that are added up, see `AdaVTPTrainingArguments.loss_weights`.
        gates_fused: whether attention keeps no scores where gates are inside it, as on a GPU. On a CPU it does.
    """

    trained: Trained
    checkpointing: bool = False
    gates: str = "features"
    losses: tuple[str, ...] = ("lm",)
    gates_fused: bool = True

    def __post_init__(self) -> None:
        if set(self.losses) - {"lm", "distillation", "relevance"} or not self.losses:
            raise ValueError(f"`losses` is {self.losses}; allowed are one or more of lm, distillation, relevance.")


@dataclass(frozen=True)
class PartFlops:
    """
    A part of the model in one step.

    Attributes:
        forward, backward: the pass and the way back.
        recomputed: what checkpointed layers run again.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.recomputed

    def times(self, factor: float) -> "PartFlops":
        """Each, times a number."""
        return PartFlops(factor * self.forward, factor * self.backward, factor * self.recomputed)

    def plus(self, other: "PartFlops") -> "PartFlops":
        """Each, added up."""
        return PartFlops(
            self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed
        )


@dataclass(frozen=True)
class TrainingFlops:
    """
    One training step of a batch, in FLOPs.

    Attributes:
        parts: by name: `"vision"`, `"reducer"` (with the budget's embedding), `"projector"`, `"decoder"`, `"head"`
            (on every position), and `"full_budget"`, the passes that distillation and relevance add.
    """

    parts: Mapping[str, PartFlops] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Everything."""
        return sum(part.total for part in self.parts.values())

    @classmethod
    def weighted(cls, steps: Sequence[tuple[float, "TrainingFlops"]]) -> "TrainingFlops":
        """The sum over steps, each times its weight."""
        parts: dict[str, PartFlops] = {}
        for weight, step in steps:
            for name, part in step.parts.items():
                parts[name] = parts.get(name, PartFlops()).plus(part.times(weight))
        return cls(parts)


@dataclass(frozen=True)
class Product:
    """
    A product of the forward pass.

    Attributes:
        flops: of it, f.
        trains: whether its weights get a gradient.
        flows: whether what enters gets one.
    """

    flops: float
    trains: bool
    flows: bool

    @property
    def backward(self) -> float:
        """f (w trains) + f (x gets a gradient)."""
        return self.flops * (self.trains + self.flows)


@dataclass(frozen=True)
class Flow:
    """
    Which tensors get a gradient.

    Attributes:
        embeddings: of the words. Checkpointing makes these and the patches' want one whatever trains, so that layers
            have something to run again for (`enable_input_require_grads` of transformers).
        token: the budget token; also where only the question in it wants one.
        tower: what enters the tower's layers. The budget token stands in one sequence with the patches, so that where
            it wants a gradient, all of them get one, though a read-only token passes none on.
        gates: the choice has gates.
        visual: what enters the projector.
        decoder: what enters the decoder.
        bias: gates inside the decoder's attention.
        language: a loss comes back through the decoder.
    """

    embeddings: bool
    token: bool
    tower: bool
    gates: bool
    visual: bool
    decoder: bool
    bias: bool
    language: bool

    @classmethod
    def of(cls, step: Step, shape: ModelShape, meets_budget: bool, is_adaptive: bool) -> "Flow":
        """Read off what trains, from the images to the loss."""
        trained = step.trained
        embeddings = trained.decoder_weights or step.checkpointing
        token = meets_budget and (trained.controller or (shape.question_aware and embeddings))
        tower = trained.vision or step.checkpointing or (token and shape.budget_fusion == "encoder")
        gates = trained.controller and is_adaptive
        visual = tower or (gates and step.gates == "features")
        return cls(
            embeddings=embeddings,
            token=token,
            tower=tower,
            gates=gates,
            visual=visual,
            decoder=embeddings or visual or trained.projector,
            bias=gates and step.gates == "attention",
            language=set(step.losses) != {"relevance"},
        )


# ---------------------------------------------------------------- what users call


def count_training_flops(
    config: AdaVTPConfig,
    text_tokens: Sequence[int],
    step: Step,
    *,
    token_budget: StackBudget | None = None,
    reducer: ReducerSpec | None = None,
    num_images: Sequence[int] | None = None,
    selection_output: str | None = None,
) -> TrainingFlops:
    """
    The FLOPs of forward and backward on one padded batch; the optimizer's own are a few per weight and not counted.

    Exact for the controller and for methods without weights, which have no gradient of their own. Of other learned
    reducers the way back is taken to cost twice their forward.

    Args:
        config: the model's.
        text_tokens: of each prompt with its answer, placeholders of images not among them.
        step: how it is carried out.
        token_budget, reducer: see [`AdaVTPForConditionalGeneration.forward`].
        num_images: of each prompt, one by default.
        selection_output: `"gather"` or `"mask"`; by default the configuration's.

    Raises:
        ValueError: if an argument is not allowed; see also [`count_flops`].
    """
    if reducer == FULL:
        reducer, token_budget = "grid", 1.0
    shape, steps = ModelShape.of(config), weightless_steps(config, reducer)
    return _counted(config, shape, steps, text_tokens, step, token_budget, num_images, selection_output)


def _counted(
    config: AdaVTPConfig,
    shape: ModelShape,
    steps: list[ReducerStep],
    text_tokens: Sequence[int],
    step: Step,
    token_budget: StackBudget | None,
    num_images: Sequence[int] | None,
    selection_output: str | None,
) -> TrainingFlops:
    num_images = tuple([1] * len(text_tokens) if num_images is None else num_images)
    output = config.selection_output if selection_output is None else selection_output
    if output not in ("gather", "mask"):
        raise ValueError(f"`selection_output` is {output!r}; allowed are 'gather' and 'mask'.")
    tokens = _tokens(config, steps, token_budget, num_images)
    # A batch without images looks at a blank one, so that all processes run the same modules.
    is_blank = not sum(num_images)
    seen = _tokens(config, steps, token_budget, [1] + [0] * (len(num_images) - 1)) if is_blank else tokens
    names = {tokens_of.step.name for tokens_of in seen.steps}
    flow = Flow.of(step, shape, seen.meets_budget, "adaptive" in names)
    stays = output == "mask" or flow.bias
    prompts = Prompts(tuple(text_tokens), tuple(text_tokens), num_images, stays)
    columns = layer_columns(prompts, shape, tokens)
    inside = PartFlops(inside_decoder_flops(prompts, shape, tokens))
    parts = {
        "vision": _tower(config, shape, seen, step, flow),
        "reducer": _reducer(config, shape, seen, step, flow).plus(inside),
        "projector": _projector(shape, seen, stays or is_blank, step, flow),
        "decoder": _decoder(shape.decoder, columns, prompts.rows, step, flow),
        "head": _head(shape.decoder, columns[-1] * prompts.rows, step, flow),
    }
    extra = _full_budget_passes(config, text_tokens, num_images, step)
    return TrainingFlops(parts if extra is None else parts | {"full_budget": extra})


def plain_training_flops(
    config: AdaVTPConfig, text_tokens: Sequence[int], step: Step, num_images: Sequence[int] | None = None
) -> TrainingFlops:
    """
    The same step of plain LLaVA on all visual tokens: no controller, no budget, and the whole tower, whose layers
    above the feature layer run for nothing.

    Args:
        config, text_tokens, step, num_images: see [`count_training_flops`].
    """
    num_images = tuple([1] * len(text_tokens) if num_images is None else num_images)
    trained = replace(step.trained, controller=False)
    step = replace(step, trained=trained, losses=("lm",))
    # A choice without weights, at full budget, is no choice.
    counted = count_training_flops(
        config, text_tokens, step, token_budget=1.0, reducer="grid", num_images=num_images, selection_output="gather"
    )
    if not sum(num_images):
        return TrainingFlops({**counted.parts, **dict.fromkeys(("vision", "reducer", "projector"), PartFlops())})
    shape = ModelShape.of(config)
    above = config.vision_config.num_hidden_layers - shape.vision.num_layers
    tokens = shape.vision.num_patches + int(shape.vision.has_cls)
    unused = sum(above * each.flops for each in tower_layer(shape, tokens, tokens, False, False))
    vision = counted.parts["vision"].plus(PartFlops(unused * sum(num_images)))
    return TrainingFlops({**counted.parts, "vision": vision})


def mean_training_flops(
    config: AdaVTPConfig,
    text_tokens: Sequence[int],
    step: Step,
    budget_range: tuple[float, float],
    *,
    per: str = "batch",
    reducer: ReducerSpec | None = None,
    num_images: Sequence[int] | None = None,
    selection_output: str | None = None,
) -> TrainingFlops:
    """
    The mean of [`count_training_flops`] over budgets b ~ U[low, high].

    A batch is as long as its longest row. With one budget for each of B samples that row keeps K or fewer tokens with
    probability P(floor(b N) <= K)^B: the more samples, the nearer to the highest budget.

    Args:
        budget_range: low and high, fractions in [0, 1].
        per: `"batch"` or `"sample"`, see `BudgetCollator`. For "sample" all prompts are taken to be equally long.
        others: see [`count_training_flops`].

    Raises:
        ValueError: if the range or `per` is not allowed.
    """
    if per not in ("batch", "sample"):
        raise ValueError(f"`per` is {per!r}; allowed are 'batch' and 'sample'.")
    draws = 1 if per == "batch" else len(text_tokens)
    steps = weightless_steps(config, "grid" if reducer == FULL else reducer)
    counted, shape = [], ModelShape.of(config)
    for keep, probability in longest_counts(budget_range, config.num_patches, draws):
        # As a count, except where it would be a count of one, which only a fraction can ask for.
        budget = 1.0 if reducer == FULL else 0.0 if keep == 1 else keep
        once = _counted(config, shape, steps, text_tokens, step, budget, num_images, selection_output)
        counted.append((probability, once))
    return TrainingFlops.weighted(counted)


def longest_counts(budget_range: tuple[float, float], num_patches: int, draws: int = 1) -> Iterator[tuple[int, float]]:
    """
    The distribution of max_j K(b_j), K(b) = max(1, floor(b N)), over independent b_j ~ U[low, high].

    Args:
        budget_range: low and high.
        num_patches: N.
        draws: how many b_j.

    Yields:
        K and its probability, for each K that has one.

    Raises:
        ValueError: if the range is empty or leaves [0, 1].
    """
    low, high = budget_range
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"`budget_range` is {budget_range!r}; allowed are two fractions 0 <= low <= high <= 1.")
    if low == high:
        yield max(1, int(round(low * num_patches, 9))), 1.0
        return
    below = 0.0
    for keep in range(1, num_patches + 1):
        # floor(b N) <= K is b < (K + 1) / N.
        reached = min(max(((keep + 1) / num_patches - low) / (high - low), 0.0), 1.0) ** draws
        if reached > below:
            yield keep, reached - below
        below = reached


# ---------------------------------------------------------------- tokens


def _tokens(
    config: AdaVTPConfig, steps: list[ReducerStep], token_budget: StackBudget | None, num_images: Sequence[int]
) -> TokenPlan:
    """As in `flops.py`, but that in training a reducer that hears the budget does so at any budget."""
    tokens = plan_tokens(config, steps, token_budget, num_images)
    asks = any("budget" in step.step.reducer.needs for step in tokens.steps)
    return replace(tokens, meets_budget=asks and bool(tokens.sample))


# ---------------------------------------------------------------- parts


def _spent(products: Sequence[Product], attention_backward: float = 0.0) -> PartFlops:
    """Products once forward and once back."""
    forward = sum(each.flops for each in products)
    return PartFlops(forward, sum(each.backward for each in products) + attention_backward)


def tower_layer(shape: ModelShape, attended: int, transformed: int, trains: bool, flows: bool) -> list[Product]:
    """Four projections and the MLP of a tower layer, its last product last; attention in between, without weights."""
    width, mlp = shape.vision.hidden_size, shape.vision.mlp_size
    # A first product of a layer that trains always passes on: the norm before it trains too.
    linear = [Product(product(attended, width, width), trains, flows or trains)] * 4
    attention = Product(2 * product(attended, width, attended), False, False)
    matrices = [Product(product(transformed, width, mlp), trains, flows or trains)] * shape.vision.mlp_matrices
    return [*linear, attention, *matrices]


def _tower(config: AdaVTPConfig, shape: ModelShape, tokens: TokenPlan, step: Step, flow: Flow) -> PartFlops:
    """Each image's convolution and layers; what reducers spend inside counts as theirs."""
    others = int(shape.vision.has_cls) + int(tokens.meets_budget and shape.budget_fusion == "encoder")
    reaches = flow.tower and (flow.language or flow.token)
    total, trains = PartFlops(), step.trained.vision
    for run in _tower_runs(shape, tokens):
        patches = product(run.patches, shape.vision.patch_pixels, shape.vision.hidden_size)
        total = total.plus(_spent([Product(patches, trains and reaches, False)]))
        for (attended, transformed), number in Counter(zip(run.attended, run.transformed, strict=True)).items():
            products = tower_layer(
                shape, attended + others, transformed + others, trains and reaches, flow.tower and reaches
            )
            attention = products[4].flops
            layer = _spent(products, FUSED_ATTENTION * attention if reaches else 0.0)
            # DINOv2 scales what its MLP makes, and the way back through the scale needs that.
            unneeded = 0.0 if config.vision_config.model_type == "dinov2" else products[-1].flops
            again = layer.forward - unneeded if step.checkpointing and reaches else 0.0
            total = total.plus(replace(layer, recomputed=again).times(number))
    return total


def _tower_runs(shape: ModelShape, tokens: TokenPlan) -> list[TowerRun]:
    first = tokens.steps[0] if tokens.steps else None
    if first is not None and first.step.reducer.stage == "encoder":
        return [tower_run(first.step.reducer, first.step.name, shape, keep) for keep in first.leaving]
    return [TowerRun.whole(shape)] * len(tokens.sample)


def _reducer(config: AdaVTPConfig, shape: ModelShape, tokens: TokenPlan, step: Step, flow: Flow) -> PartFlops:
    """Choosing, wherever it happens before the decoder, and the budget's embedding."""
    total, images = PartFlops(), len(tokens.sample)
    reducers = [step_tokens.step.reducer for step_tokens in tokens.steps]
    reducers += [tokens.decoder[1]] if tokens.decoder else []
    read = {layer for reducer in reducers if "attention" in reducer.needs for layer in reducer.attention_layers}
    total = total.plus(PartFlops(images * attention_rows(shape, len(read))))
    total = total.plus(PartFlops(sum(run.own for run in _tower_runs(shape, tokens))))
    chosen_by = flow.gates and (flow.language or "relevance" in step.losses)
    if tokens.meets_budget:
        arrives = (flow.tower or chosen_by) if shape.budget_fusion == "encoder" else chosen_by
        total = total.plus(_budget_token(shape, step, flow, arrives).times(images))
    for step_tokens in tokens.steps:
        reducer, name = step_tokens.step.reducer, step_tokens.step.name
        if reducer.stage not in ("vision", "projector"):
            continue
        pairs = zip(step_tokens.entering, step_tokens.leaving, strict=True)
        forward = sum(image_flops(reducer, name, config, shape, n, keep) for n, keep in pairs)
        if name == "adaptive" and flow.gates and shape.controller_choice == "spread":
            # Choosing what is unlike each other is for a controller that does not train.
            forward -= sum(product(n, shape.vision.patch_width, n) for n in step_tokens.entering)
        learns = chosen_by if name == "adaptive" else step.trained.controller and REDUCERS[name].trained
        total = total.plus(PartFlops(forward, 2.0 * forward if learns else 0.0))
    return total


def _budget_token(shape: ModelShape, step: Step, flow: Flow, arrives: bool) -> PartFlops:
    """The two layers of the budget's embedding, the question's projection, and Option B's cross-attention."""
    width, trains = shape.vision.hidden_size, step.trained.controller and arrives
    products = [Product(product(1, BUDGET_ENCODING, width), trains, False)]
    products.append(Product(product(1, width, width), trains, trains))
    if shape.question_aware:
        asks = product(1, shape.decoder.hidden_size, width)
        products.append(Product(asks, trains, flow.embeddings and arrives))
    embedded = _spent(products)
    if shape.budget_fusion == "encoder":
        return embedded
    read = budget_cross_attention(shape, shape.vision.num_patches)
    attention = 2 * product(1, width, shape.vision.num_patches)
    back = 2.0 * (read - attention) + FUSED_ATTENTION * attention if trains else 0.0
    return embedded.plus(PartFlops(read, back))


def _projector(shape: ModelShape, tokens: TokenPlan, stays: bool, step: Step, flow: Flow) -> PartFlops:
    """Two linear maps, of as many tokens as reach them; rows filled up to the longest."""
    # What `projector_flops` counts is rows times the two maps.
    from .vision_flops import projector_flops

    width, patch = shape.decoder.hidden_size, shape.vision.patch_width
    one = product(1, patch, width) + product(1, width, width)
    rows = projector_flops(shape, tokens, stays) / one
    trains = step.trained.projector and flow.language
    flows = flow.visual and flow.language
    first = Product(product(rows, patch, width), trains, flows)
    return _spent([first, Product(product(rows, width, width), trains, flows or trains)])


def decoder_layer(decoder: DecoderShape, n: int, trained: Trained, enters: bool, inside: bool) -> list[Product]:
    """
    The linear maps of a decoder layer on n columns, the last one last, each with its adapter x A B where there is one.

    Args:
        decoder: its shape.
        n: columns.
        trained: what trains.
        enters, inside: whether what enters the layer gets a gradient, and what its first maps and attention make.
    """
    width, query, key, mlp = decoder.hidden_size, decoder.query_width, decoder.key_width, decoder.mlp_size
    trains, rank = trained.decoder_weights and inside, trained.lora_rank
    # Where the layer trains, so does the norm before its first maps.
    first = enters or trains
    maps = [(width, query, first), (width, key, first), (width, key, first)]
    maps += [(query, width, inside), (width, mlp, inside), (width, mlp, inside), (mlp, width, inside)]
    products = []
    for wide, out, passes in maps:
        products.append(Product(product(n, wide, out), trains, passes))
        if rank is not None:
            products += [
                Product(product(n, wide, rank), inside, passes),
                Product(product(n, rank, out), inside, inside),
            ]
    return products


def _decoder(decoder: DecoderShape, columns: Sequence[int], rows: int, step: Step, flow: Flow) -> PartFlops:
    """All layers, each with its own number of columns; those that are alike are counted once."""
    enters = [flow.decoder or (number > 0 and (step.trained.decoder or flow.bias)) for number in range(len(columns))]
    total = PartFlops()
    for (n, flows), number in Counter(zip(columns, enters, strict=True)).items():
        total = total.plus(_decoder_layer(decoder, n, flows, step, flow).times(number * rows))
    return total


def _decoder_layer(decoder: DecoderShape, n: int, flows: bool, step: Step, flow: Flow) -> PartFlops:
    """One layer on one row of n columns."""
    trained = step.trained
    reaches = flow.language and (flows or trained.decoder or flow.bias)
    products = decoder_layer(decoder, n, trained, flows and reaches, reaches)
    attention, factor = 2 * product(n, decoder.query_width, n), FUSED_ATTENTION
    if flow.bias and not step.gates_fused:
        factor = KEPT_SCORES if flows or trained.decoder else ONLY_BIAS
    spent = _spent(products)
    back = spent.backward + factor * attention if reaches else 0.0
    # What comes last in a layer is added up, and nothing on the way back needs it.
    again = spent.forward + attention - products[-1].flops if reaches and step.checkpointing else 0.0
    return PartFlops(spent.forward + attention, back, again)


def _head(decoder: DecoderShape, positions: int, step: Step, flow: Flow) -> PartFlops:
    """Logits of every position, as the loss of a training step has them."""
    flops = product(positions, decoder.hidden_size, decoder.vocab_size)
    flows = flow.decoder or step.trained.decoder or flow.bias
    head = Product(flops, step.trained.decoder_weights and flow.language, flows and flow.language)
    return _spent([head])


def _full_budget_passes(
    config: AdaVTPConfig, text_tokens: Sequence[int], num_images: Sequence[int], step: Step
) -> PartFlops | None:
    """
    Distillation runs the model once more at full budget. So does relevance, and its gradient comes back through head
    and decoder to the projected tokens, past weights that get none.
    """
    passes = [name for name in ("distillation", "relevance") if name in step.losses]
    if not passes or not sum(num_images):
        return None
    frozen = replace(step, trained=Trained(projector=True), checkpointing=False, losses=("lm",))
    once = count_training_flops(
        config, text_tokens, frozen, token_budget=1.0, reducer="grid", num_images=num_images, selection_output="gather"
    )
    if config.budget_fusion == "encoder" and config.budget_attention == "mutual":
        raise ValueError(
            "`losses` asks for a pass at full budget, which is not counted for budget_attention='mutual'."
        )
    total = PartFlops()
    for name in passes:
        forward = sum(part.forward for part in once.parts.values())
        back = once.parts["decoder"].backward + once.parts["head"].backward if name == "relevance" else 0.0
        total = total.plus(PartFlops(forward, back))
    return total

"""The scale plan as a page: LLaVA-1.5 7B and 13B on 8 GPUs of two sizes, with the formulas worked out."""

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ..modeling.costs.presets import preset_config
from ..modeling.costs.training_step import Step
from .training_budgets import longest_counts
from .training_costs import A100_PEAK, GIB, PUBLISHED_GPUS, PUBLISHED_RUNS, PUBLISHED_SOURCE, MeasuredStep, Run
from .training_memory import LIVE_PARAMETERS, LOGIT_BYTES, NF4_BYTES, REDUCE_BUCKET, Layout, Weights, activations

GPUS, SIZES = 8, (80, 40)
MODELS = ("llava-1.5-7b", "llava-1.5-13b")
BUDGETS = (0.2, 1.0)


class Setting(NamedTuple):
    """A way to train, with its name."""

    name: str
    strategy: str
    parts: tuple[str, ...]
    lora: int | None = None
    quantize: bool = False


SETTINGS = (
    Setting("whole, ZeRO-3", "zero3", ("controller", "projector", "decoder")),
    Setting("whole, FSDP2", "fsdp2", ("controller", "projector", "decoder")),
    Setting("LoRA 16, DDP", "ddp", ("controller", "projector", "decoder"), 16),
    Setting("QLoRA 16 (NF4), DDP", "ddp", ("controller", "projector", "decoder"), 16, True),
    Setting("controller alone, DDP", "ddp", ("controller",)),
)


def plan_page(
    command: str,
    measured: MeasuredStep | None,
    choice: dict[str, Any] | None,
    utilisations: list[float],
    text_tokens: int,
    longest: int,
    reserve: float,
) -> str:
    """
    Writes the page.

    Args:
        command: that makes it, as typed.
        measured, choice: the results of `benchmarks/training.py` and `benchmarks/overhead.py`, or `None`.
        utilisations: shares of the peak for which hours are given.
        text_tokens, longest: see [`Run`].
        reserve: GiB.
    """
    about = Run(
        preset_config(MODELS[0]),
        Step(SETTINGS[0].parts, checkpointing=True),
        Layout("zero3", GPUS, reserve * GIB),
        BUDGETS,
        text_tokens=text_tokens,
        longest=longest,
    )
    blocks = [
        f"# What a large run will cost\n\n`{command}` wrote this page. `adavtp plan` prints the same for one run, "
        "with every setting an option.",
        _assumptions(about, utilisations),
        _memory_formulas(about),
        _memory(about),
        _flops_formulas(about),
        _time(about, utilisations, measured),
        _published(),
        _overheads(measured, choice),
        _advice(about),
    ]
    return "\n\n".join(_filled(paragraph) for block in blocks for paragraph in block.split("\n\n")) + "\n"


def _filled(paragraph: str) -> str:
    """Text in lines as long as the repository's; tables and headings as they are."""
    if paragraph.startswith(("|", "#")):
        return paragraph
    return textwrap.fill(paragraph, 119, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _assumptions(about: Run, utilisations: list[float]) -> str:
    low, high = about.budget_range
    shares = ", ".join(f"{share:g}" for share in utilisations)
    return f"""## What is assumed

{about.samples} samples with one image of {about.visual_tokens} visual tokens and {about.text_tokens} text tokens
on average; the longest has {about.longest} columns at full budget. Budgets are drawn from U[{low:g}, {high:g}], one
for each batch; gates on the features (`gradient_gates="features"`), sequences gathered; gradient checkpointing;
bfloat16 with AdamW; {GPUS} GPUs of {A100_PEAK / 1e12:g} TFLOPs a second (A100, bfloat16, data sheet). Utilisation,
the share of that peak which is reached, is an assumption: {shares}. {about.layout.reserve / GIB:g} GiB of each GPU are
left for context, communication library and fragmentation. Memory is counted and has not been measured on GPUs."""


def _runs(about: Run, model: str) -> Iterator[tuple[Setting, Run]]:
    for setting in SETTINGS:
        yield (
            setting,
            replace(
                about,
                config=preset_config(model),
                step=replace(about.step, parts=setting.parts, lora_rank=setting.lora),
                layout=replace(about.layout, strategy=setting.strategy),
                quantize=setting.quantize,
            ),
        )


def _memory_formulas(about: Run) -> str:
    weights = Weights.of(about.config, about.step)
    t, f = weights.trained, weights.frozen
    sizes = activations(about.config, about.step, rows=1, text_tokens=about.longest - about.image_columns)
    width, depth = about.config.text_config.hidden_size, about.config.text_config.num_hidden_layers
    entering = depth * about.longest * width * 2
    logits = LOGIT_BYTES * about.longest * about.config.text_config.vocab_size
    states = (2 * (t + f) + 2 * t + 12 * t) / GPUS
    return f"""## Memory: the formula

With T trained and F frozen parameters on N GPUs, bytes on each:

| | weights | gradients | AdamW | at a time |
| --- | --- | --- | --- | --- |
| DDP | 4 T + 2 F, copies 2 T | 4 T | 8 T | buckets 4 T |
| ZeRO-2 | 2 (T + F) | 2 T / N | 12 T / N | 4 min(T, {REDUCE_BUCKET:.0e}) |
| ZeRO-3 | 2 (T + F) / N | 2 T / N | 12 T / N | 2 min(T + F, {LIVE_PARAMETERS:.0e}) + 4 min(T, {REDUCE_BUCKET:.0e}) |
| FSDP2 | (4 T + 2 F) / N | 4 T / N | 8 T / N | two layers and the head, 2 bytes; a layer's gradients |

Under DeepSpeed the float32 weights are part of AdamW's column; accelerate makes trained weights float32 for FSDP2;
four bits are {NF4_BYTES:.3f} bytes. With checkpointing, each row of n columns adds what enters the layers, 2 L n D,
and the larger of the logits, {LOGIT_BYTES} n V, and one layer's own tensors (noted while a model without weights runs;
the tests compare it with what autograd saves and torch allocates).

For {MODELS[0]} trained whole, T = {t / 1e9:.3f}e9 and F = {f / 1e9:.3f}e9: under ZeRO-3 (2 x {(t + f) / 1e9:.3f} +
14 x {t / 1e9:.3f}) / {GPUS} = {states / 1e9:.2f} GB of states on each GPU; a row of {about.longest} columns adds 2 x
{depth} x {about.longest} x {width} = {entering / 1e9:.2f} GB and {sizes["logits or a layer"] / 1e9:.2f} GB, of which
the logits would be {LOGIT_BYTES} x {about.longest} x {about.config.text_config.vocab_size} = {logits / 1e9:.2f} GB."""


def _memory(about: Run) -> str:
    rows = []
    for model in MODELS:
        for setting, run in _runs(about, model):
            names = ("weights", "half-precision copies", "gradients", "optimizer")
            states = sum(run.memory.get(name, 0.0) for name in names)
            total, moved = sum(run.memory.values()), run.memory["communication"]
            fits = [run.largest_micro_batch(size * GIB) for size in SIZES]
            numbers = (states, moved, total - states - moved - about.layout.reserve, total)
            cells = [f"{number / GIB:.1f}" for number in numbers]
            rows.append([f"{model}, {setting.name}", *cells, *("-" if fit is None else str(fit) for fit in fits)])
    head = ["GiB on each GPU", "states", "communication", "a row", "total with one row"]
    return (
        "## Memory: what fits\n\n"
        + _table([*head, *(f"rows that fit {size} GiB" for size in SIZES)], rows)
        + "\n\nRows are the longest there are, tried in powers of two up to 32; a dash does not fit."
    )


def _flops_formulas(about: Run) -> str:
    flops, plain = about.flops, about.plain_flops
    rows = []
    for name, part in flops.parts.items():
        other = plain.parts[name]
        cells = [part.forward, part.backward, part.recomputed, part.total, other.total]
        rows.append([name, *(f"{cell / 1e12:.3f}" for cell in cells)])
    rows.append(["total", "", "", "", f"{flops.total / 1e12:.3f}", f"{plain.total / 1e12:.3f}"])
    patches = about.visual_tokens
    mean = sum(count.keep * count.probability for count in longest_counts(BUDGETS, [patches]))
    return f"""## FLOPs: the formula

A product of f FLOPs costs f forward, f for the gradient of its weights if they train, f for that of what enters it if
something in front of it trains; attention costs 2.5 times its forward on the way back; checkpointing runs each layer
once more. The mean over budgets is a sum over K with the probabilities that U[{BUDGETS[0]:g}, {BUDGETS[1]:g}] gives
them; the mean K is {mean:.1f} of {patches}. TFLOPs of a sample, {MODELS[0]} trained whole:

{_table(["part", "forward", "backward", "again", "total", "plain LLaVA"], rows)}

Plain LLaVA is what transformers runs: all visual tokens, the whole tower. The count has been compared with torch's
own over forward and backward (`tests/modeling/costs/test_training_costs.py`)."""


def _time(about: Run, utilisations: list[float], measured: MeasuredStep | None) -> str:
    overhead, rows = 1.0 if measured is None else measured.overhead, []
    for model in MODELS:
        for setting, run in _runs(about, model):
            ours, plain = run.flops.total, run.plain_flops
            cells = [f"{ours / 1e12:.1f}"]
            cells += ["-", "-"] if plain is None else [f"{plain.total / 1e12:.1f}", f"{plain.total / ours:.2f}"]
            for share in utilisations:
                hours = run.hours(A100_PEAK, share, overhead)
                alone = "-" if plain is None else f"{hours['plain']:.1f}"
                cells.append(f"{hours['with_overhead']:.1f} / {alone}")
            rows.append([f"{model}, {setting.name}", *cells])
    head = ["", "TFLOPs of a sample", "plain LLaVA", "ratio"]
    with_overhead = "" if measured is None else f", ours with the measured overhead of {overhead:.3f}"
    return (
        "## Time\n\nhours = samples x FLOPs x overhead / (GPUs x peak x utilisation) / 3600. Each cell: AdaVTP / "
        f"plain LLaVA at the same utilisation{with_overhead}.\n\n"
        + _table([*head, *(f"hours at {share:g}" for share in utilisations)], rows)
        + "\n\nSharded runs also wait for each other and for the network, which utilisation has to cover."
    )


def _published() -> str:
    lengths = (100, 200, 300)
    rows = [
        [run.name, run.gpu, f"{PUBLISHED_GPUS}", f"{run.hours:g}", *(f"{run.utilisation(n):.2f}" for n in lengths)]
        for run in PUBLISHED_RUNS
    ]
    head = ["", "GPU", "GPUs", "hours, as stated"]
    return (
        "## A published anchor\n\nLLaVA-1.5's authors state how long visual instruction tuning took on their 665K "
        f"samples ({PUBLISHED_SOURCE}). By our count, recomputation included, that is a utilisation of\n\n"
        + _table([*head, *(f"at {n} text tokens" for n in lengths)], rows)
        + "\n\nThey do not state the mean number of text tokens, hence three columns."
    )


def _overheads(measured: MeasuredStep | None, choice: dict[str, Any] | None) -> str:
    says = ["## What was measured"]
    if measured is None:
        says.append("Nothing yet of training: `python benchmarks/training.py --json FILE`, then `--measured FILE`.")
    else:
        share = measured.waiting
        waiting = "" if share is None else f" Waiting for data took {100 * share:.2f} % of a step."
        says.append(
            f"`{measured.command}` on {measured.machine}: a training step with one budget a batch does "
            f"{measured.speed_up:.2f} (quartiles {measured.lower:.2f} to {measured.upper:.2f}) times plain LLaVA's "
            f"samples a second, where counted FLOPs say {measured.expected:.2f}; the overhead is their quotient, "
            f"{measured.overhead:.3f}.{waiting} It is a small shape on a small machine; with `--preset llava-1.5-7b "
            "--device cuda --dtype bfloat16 --checkpointing` the same command measures the large one."
        )
    if choice is not None:
        ratios = [f"{row['ratio']['median']:.3f} at budget {row['budget']:g}" for row in choice["pruned_prefill"]]
        says.append(
            f"`{choice['command']}`: the forward pass of a prompt, against stock parts that are told which tokens to "
            f"take, so what choosing alone costs: {', '.join(ratios)} times as long."
        )
    return "\n\n".join(says)


def _advice(about: Run) -> str:
    runs = {
        "one budget a batch": about,
        "a budget for each of 8 samples": replace(about, per="sample", micro_batch=8),
        "gates inside attention": replace(about, step=replace(about.step, gates="attention")),
    }
    rows = [[name, f"{about.plain_flops.total / run.flops.total:.2f}"] for name, run in runs.items()]
    return f"""## What makes it fast

{MODELS[0]} trained whole, plain LLaVA's FLOPs over ours:

{_table(["budgets U[0.2, 1.0]", "ratio"], rows)}

A batch is as long as its longest row, so budgets that differ inside a batch save little unless rows are grouped by
their length behind the reduction (`group_by_length`), which nearly brings back the first line. Gates inside attention
keep every token while the controller trains: use them to train a controller alone or for a short stage, then train the
rest with gates on the features."""

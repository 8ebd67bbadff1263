"""`adavtp flops`: what a model costs at a budget, counted from its configuration alone."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..evaluation.settings import FULL, budget_of_text, exact_budget, reducer_of_text
from .console import console

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..modeling.costs.model_costs import Costs

# Of an image; each has a position that is written down.
MOST_PATCHES = 2**20
# Of the side of an image.
MOST_PIXELS = 2**14

Preset = Annotated[str | None, typer.Option(help="A well-known shape, such as llava-1.5-7b or qwen2.5-vl-7b.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint folder in its place; only its config.json is read.")]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Height and width of an image in pixels, as in 448x672, for other families than LLaVA."),
]
VisualTokens = Annotated[
    int | None,
    typer.Option(help="Patches of an image, a square. Default: the preset's own.", min=1, max=MOST_PATCHES),
]
Budget = Annotated[
    str | None, typer.Option(help="Token budget, a fraction or a number. Default: the reducer's own rule, or all.")
]
Reducer = Annotated[
    str | None,
    typer.Option(help="Reducer as in fastv:layer=2, or a stack as in tome,adaptive; full keeps everything."),
]
Latency = Annotated[
    float | None, typer.Option(help="AdaLLaVA's latency budget: the share of the decoder that runs, from 0 to 1.")
]


def flops(
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    visual_tokens: VisualTokens = None,
    image_size: ImageSize = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.", min=0)] = 60,
    images: Annotated[int, typer.Option(help="Images in the prompt.", min=0, max=1024)] = 1,
    budget: Budget = None,
    reducer: Reducer = None,
    convention: Annotated[str, typer.Option(help="How to count: adavtp, fastv, prumerge or adallava.")] = "adavtp",
    latency: Latency = None,
    latency_unit: Annotated[str, typer.Option(help="What it runs or skips: layer or head.")] = "layer",
    new_tokens: Annotated[int, typer.Option(help="Generated tokens, for the total.", min=1)] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of the cache. Default: the configuration's.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Published figures beside ours, and nothing else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count FLOPs of vision tower, reducer, projector, prefill and decode, without allocating weights."""
    if published:
        _print_published(as_json)
        return
    from ..evaluation.flops_conventions import count_flops, latency_plan
    from ..modeling.costs.model_costs import ModelCosts

    costs = ModelCosts.of(model_config(preset, checkpoint, visual_tokens), size_of_text(image_size))
    sizes = costs.visual_tokens(FULL).sizes
    asked = {
        "token_budget": _budget_of_text(budget, sizes),
        "reducer": reducer_of_text(reducer) if reducer not in (None, FULL) else reducer,
        "num_images": images,
    }
    plan = None if latency is None else latency_plan(latency, costs.config.get_text_config(), latency_unit)
    others = {"new_tokens": new_tokens, "dtype": dtype, "plan": plan}
    counted = count_flops(costs, text_tokens, convention, **asked, **others)
    settings = {
        "model": preset or str(checkpoint),
        "reducer_name": reducer or costs.config.reducer,
        "budget": asked["token_budget"],
        "visual_tokens": sum(sizes),
        "text_tokens": text_tokens,
        "images": images,
        "latency": latency,
    }
    if as_json:
        typer.echo(json.dumps({**counted.as_dict(), **settings}))
    else:
        console.print(_table(counted, settings))


def _budget_of_text(text: str | None, sizes: Sequence[int]) -> float | int | None:
    """A budget for units with so many visual tokens; of units that differ a fraction is another count in each."""
    written = None if text is None else budget_of_text(text)
    if isinstance(written, Fraction) and len(set(sizes)) > 1:
        return float(written)
    return None if written is None else exact_budget(written, sizes[0])


def size_of_text(text: str | None) -> tuple[int, int] | None:
    """Height and width in pixels, from `448x672`."""
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side) <= MOST_PIXELS for side in sides):
        raise ValueError(f"`image_size` is {text!r}; write height and width in pixels, up to {MOST_PIXELS}: 448x672.")
    return int(sides[0]), int(sides[1])


def model_config(preset: str | None, checkpoint: Path | None, visual_tokens: int | None) -> "PreTrainedConfig":
    """The configuration that is asked for."""
    from ..modeling.costs.presets import preset_config

    if (preset is None) == (checkpoint is None):
        raise ValueError("Give one of `--preset` and `--checkpoint`.")
    return preset_config(preset, visual_tokens) if preset else _config_of_folder(checkpoint, visual_tokens)


def _config_of_folder(checkpoint: Path, visual_tokens: int | None) -> "PreTrainedConfig":
    from ..configuration.configuration_adavtp import AdaVTPConfig
    from ..modeling.families.llava import LLAVA
    from ..modeling.hub.loading import check_configuration, family_class

    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"`checkpoint` is '{checkpoint}'; a folder with a config.json is needed.")
    family = family_class(checkpoint, {})
    if family is not None:
        if visual_tokens is not None:
            kind = family.config_class.model_type
            raise ValueError(
                f"`checkpoint` is '{checkpoint}', a {kind!r} model: `--image-size` says its visual tokens."
            )
        return family.config_class.from_pretrained(checkpoint)
    check_configuration(AdaVTPConfig, checkpoint, {})
    config = AdaVTPConfig.from_pretrained(checkpoint)
    if visual_tokens not in (None, LLAVA.tokens_per_image(config)):
        size = LLAVA.tokens_per_image(config)
        raise ValueError(f"`visual_tokens` is {visual_tokens}; this checkpoint's images have {size}. Leave it out.")
    return config


def _table(counted: "Costs", settings: dict[str, Any]) -> Table:
    from ..evaluation.flops_conventions import CONVENTIONS, NOT_COUNTED, per_layer

    is_ours = counted.convention == "adavtp"
    says = "1 MAC = 2 FLOPs; products, convolutions, attention" if is_ours else CONVENTIONS[counted.convention].says
    asked = "its own rule or all" if settings["budget"] is None else f"budget {settings['budget']}"
    table = Table(
        title=escape(
            f"{settings['model']}: {settings['images']} x {settings['visual_tokens']} visual and "
            f"{settings['text_tokens']} text tokens, {settings['reducer_name']}, {asked}"
        ),
        caption=escape(f"convention {counted.convention}: {says}"),
    )
    table.add_column("part")
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("")
    meaning = {
        "vision": "tower, up to the feature layer",
        "reducer": "choosing and merging",
        "projector": "on the tokens that reach it",
        "prefill": "decoder on the prompt, head on the last position",
        "decode_per_token": "the first; each further one a little more",
    }
    for part, note in meaning.items():
        excluded = not is_ours and part in NOT_COUNTED
        table.add_row(part, scaled(getattr(counted, part)), "the paper does not count it" if excluded else note)
    tokens = "1 new token" if counted.new_tokens == 1 else f"{counted.new_tokens} new tokens"
    table.add_row("total", scaled(counted.total), f"with {tokens}", end_section=True)
    if counted.convention == "fastv":
        table.add_row("prefill per layer", scaled(per_layer(counted)), "as the paper's table prints it")
    table.add_row("kv_bytes", f"{counted.kv_bytes / 1e6:.1f} MB", "keys and values of the prompt")
    table.add_row("mean_visual_tokens", f"{counted.mean_visual_tokens:.1f}", "that a decoder layer sees of an image")
    return table


def scaled(number: float) -> str:
    """A number of FLOPs in tera, giga or mega."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3f} {letter}"
    return f"{number:.0f}"


def _print_published(as_json: bool) -> None:
    from ..evaluation.flops_conventions import published_rows

    rows = published_rows()
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows]))
        return
    table = Table(title="Published FLOPs of LLaVA-1.5-7B, and ours in the same convention")
    for column in ("paper", "setting", "unit", "published", "ours", "ratio", "within 3 %", "note"):
        table.add_column(column, justify="right" if column in ("published", "ours", "ratio") else "left")
    notes = list(dict.fromkeys(row.reason for row in rows))
    for row in rows:
        table.add_row(
            row.paper,
            escape(row.setting),
            row.unit,
            f"{row.published:g}",
            "-" if row.ours is None else f"{row.ours:.4g}",
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            "yes" if row.is_reproduced else "no",
            str(notes.index(row.reason) + 1),
        )
    console.print(table)
    for number, note in enumerate(notes, start=1):
        console.print(f"{number}: {escape(note)}", highlight=False)

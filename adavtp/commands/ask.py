"""`adavtp ask`: one question about one image, at a token budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.prompt_costs import visual_tokens_seen
from ..evaluation.reducer_table import as_trained
from ..evaluation.settings import (
    budget_of_text,
    exact_budget,
    reducer_label,
    reducer_of_text,
    tokens_per_image,
)
from ..modeling.processing_adavtp import inputs_of_questions
from .console import CheckpointOption, console, load_checkpoint

# Pixels; a smaller image is enlarged.
PICTURE_HEIGHT = 288


def ask(
    image: Annotated[Path, typer.Argument(help="Image file.", exists=True, dir_okay=False)],
    prompt: Annotated[str, typer.Argument(help="Question.")],
    budget: Annotated[
        str | None, typer.Option(help="Fraction of visual tokens such as 0.4, or their number. Default: all.")
    ] = None,
    reducer: Annotated[
        list[str] | None,
        typer.Option(help="What chooses, with parameters as in fastv:layer=2. Several make a stack, in their order."),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Write the image with its kept patches here: the brighter, the more decoder layers see a patch. Of "
            "reducers that merge, the patches in whose place tokens stand."
        ),
    ] = None,
    depth_budget: Annotated[str | None, typer.Option(help="Share or number of the decoder's layers that run.")] = None,
    width_budget: Annotated[str | None, typer.Option(help="Share of its heads and MLP channels that run.")] = None,
    compute_budget: Annotated[
        float | None, typer.Option(help="In place of all budgets: share of the full model's FLOPs.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="What chooses layers and heads: even, first or random. Default: the model's own."),
    ] = None,
    show_plan: Annotated[
        Path | None, typer.Option(help="Write a picture of the layers, heads and MLP channels that ran here.")
    ] = None,
    checkpoint: CheckpointOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 32,
) -> None:
    """Ask a question about an image at a token budget."""
    model, processor = load_checkpoint(checkpoint)
    choice: dict[str, Any] = {"compute_budget": compute_budget}
    if compute_budget is None or budget is not None:
        choice["token_budget"] = exact_budget(budget_of_text(budget or "1.0"), tokens_per_image(model))
    for dial, value in (("depth_budget", depth_budget), ("width_budget", width_budget)):
        choice[dial] = None if value is None else exact_budget(budget_of_text(value), None)
    choice = {name: value for name, value in (choice | {"scheduler": scheduler}).items() if value is not None}
    if reducer:
        choice["reducer"] = as_trained(model.config, reducer_of_text(",".join(reducer)))
    inputs = inputs_of_questions(processor, str(image), prompt).to(model.device)
    output = model.generate(**inputs, **choice, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    new_ids, selection = output.sequences[0, inputs["input_ids"].shape[1] :], output["selection"]
    console.print(processor.decode(new_ids, skip_special_tokens=True).strip(), highlight=False)
    num_layers = model.config.get_text_config().num_hidden_layers
    over_layers = ", mean over decoder layers" if selection.depth is not None else ""
    tokens = float(visual_tokens_seen(selection, num_layers).sum())
    by = f", chosen by {reducer_label(choice.get('reducer', model.config.reducers))}"
    console.print(f"{tokens:g} of {int(selection.sizes.sum())} visual tokens{over_layers}{by}", style="dim")
    plan = output["plan"] or model.whole_plan()
    if not plan.is_whole:
        shares = plan.shares(0)
        heads, channels = (sum(of_layers) / num_layers for of_layers in (shares.heads, shares.mlp))
        ran = f"{int(plan.runs.sum())} of {num_layers} decoder layers ran, {heads:.0%} of all attention heads and "
        console.print(f"{ran}{channels:.0%} of all MLP channels", style="dim")
    if show_plan is not None:
        from ..evaluation.pictures import save_plan

        save_plan(plan, show_plan)
    if show is not None:
        model.picture_of_kept(str(image), prompt, selection, least_height=PICTURE_HEIGHT).save(show)

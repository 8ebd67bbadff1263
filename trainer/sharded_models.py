"""What training needs to know of a model whose parameters are spread over processes (FSDP2, ZeRO-3).

A process has a part of every layer. When a layer runs, all processes give their parts, so all have to run the same
modules in the same order; one that does not lets the others wait forever. Whatever its budgets and images, a batch
does: texts look at a blank image, every image goes through the reducer, and the tower runs as often as on the process
that shows images and videos. Some reducers cannot promise that.
"""

from ..modeling.families.encoded import layers_of
from ..modeling.prompt_reduction import PromptReductionMixin


def layer_classes(model: PromptReductionMixin) -> list[str]:
    """Class names of the decoder's and of the tower's layers, which FSDP puts together one at a time."""
    layers = [*layers_of(model.prompt_decoder), *layers_of(model.get_encoder(modality="image"))]
    return sorted({type(layer).__name__ for layer in layers})


def require_same_modules(model: PromptReductionMixin, is_fsdp: bool) -> None:
    """
    Raises `ValueError` for a model with a scheduler that trains, and for one whose chosen reducers do not run the same
    modules for every batch. With FSDP
    (`is_fsdp`) layers are whole only when they run as a whole; with ZeRO-3 their parts are, too.
    """
    if model.scheduler is not None and any(weight.requires_grad for weight in model.scheduler.parameters()):
        raise ValueError(
            "`train_parts` has 'scheduler', which runs layers with gates of its own; processes that share parameters "
            "(FSDP, ZeRO-3) cannot do that yet. Train with DDP or ZeRO-2, or leave the scheduler as it is."
        )
    steps, units_differ = model.steps(), model.family.units_differ
    for step in steps:
        reducer, reason = step.reducer, None
        if reducer.stage == "decoder":
            reason = "acts inside the decoder, for prompts with images only"
        elif len(steps) > 1 or reducer.one_count:
            reason = "runs once for every number of tokens that the images of a batch have or keep"
        elif reducer.stage == "encoder" and units_differ:
            reason = "lets the tower run once for every number of tokens that the images of a batch have"
        elif not is_fsdp and units_differ and not reducer.takes_padding and any(True for _ in reducer.parameters()):
            reason = "runs once for every size of image in a batch, and ZeRO-3 puts its weights together each time"
        elif is_fsdp and "attention" in reducer.needs:
            reason = "reads the queries and keys of a layer that does not run, which FSDP has only while it does"
        if reason is not None:
            raise ValueError(
                f"`reducer` is {model.config.reducers!r}, and {step.name!r} {reason}. Processes that share parameters "
                "(FSDP, ZeRO-3) have to run the same modules. Train with DDP or ZeRO-2, or choose another reducer."
            )
